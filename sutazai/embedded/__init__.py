"""The whole system on one machine: private PostgreSQL and Valkey, and the processes supervised.

    env = prepare(home, 10000, 10001)              # the servers' data, passwords and `home/env`
    supervise(home, [*server_programs(home), worker], run)      # in the foreground, until stopped
    Supervisor(home).restart("worker")             # from any other process

Everything lives in one folder, the *home*. A program is either executed (the servers) or runs our
own code in a fork of the supervising process, which has imported everything before.
The extra `embedded` is needed only by `prepare` and by whatever talks to supervisord.
"""

from sutazai.embedded.client import ProgramState, Supervisor
from sutazai.embedded.layout import Layout
from sutazai.embedded.leftovers import recover
from sutazai.embedded.port import port_holder
from sutazai.embedded.program import Program, Run, supervise
from sutazai.embedded.servers import prepare, server_programs, wait_for_servers

__all__ = [
    "Layout",
    "Program",
    "ProgramState",
    "Run",
    "Supervisor",
    "port_holder",
    "prepare",
    "recover",
    "server_programs",
    "supervise",
    "wait_for_servers",
]
