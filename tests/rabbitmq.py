"""A private RabbitMQ node of the tests: own data, own epmd, on loopback only."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType

SCRIPTS = Path("/usr/lib/rabbitmq/bin")
"""Where Debian has the programs themselves; those on the path insist on a user of their own."""

ANSWERS_WITHIN_S = 60.0
STOPS_WITHIN_S = 30.0


def is_installed() -> bool:
    """Whether the server and what runs it are on this machine."""
    return all(map(shutil.which, (str(SCRIPTS / "rabbitmq-server"), "erl", "epmd", "setpriv")))


class Node(AbstractContextManager["Node"]):
    """One node, which runs within the context."""

    def __init__(self, folder: Path, port: int, distribution_port: int, epmd_port: int) -> None:
        self._folder = folder
        self._epmd_port = epmd_port
        self.port = port
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        (folder / "rabbitmq.conf").write_text("log.file.level = info\n")
        (folder / "plugins").write_text("[].\n")
        self._env = os.environ | {
            "HOME": str(folder),  # of the cookie
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "sutazai-test@localhost",
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ("-kernel inet_dist_use_interface {127,0,0,1}"),
            # Makes the script replace itself by the server, so that our signals reach it.
            "RUNNING_UNDER_SYSTEMD": "1",
        }

    def __enter__(self) -> Node:
        """Start the node, and return when it takes connections."""
        # A daemon that a node starts by itself would outlive it.
        self._epmd = self._run("epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1")
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the node."""
        self.resume()
        self.stop()
        self._epmd.terminate()
        self._epmd.wait(STOPS_WITHIN_S)

    def start(self) -> None:
        """Start the node, and return when it takes connections."""
        self._server = self._run(str(SCRIPTS / "rabbitmq-server"))
        until = time.monotonic() + ANSWERS_WITHIN_S
        while not self._answers():
            if self._server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"RabbitMQ did not start: {self._output()}")
            time.sleep(0.05)

    def stop(self, *, kill: bool = False) -> None:
        """Stop the node in order, or as a crash does."""
        if kill:
            self._server.kill()
        else:
            self._server.terminate()
        try:
            self._server.wait(STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def forget(self) -> None:
        """Delete all data of the stopped node."""
        shutil.rmtree(self._folder / "data")

    def freeze(self) -> None:
        """Let the node hold still; its machine goes on to take connections for it."""
        self._server.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen node go on."""
        self._server.send_signal(signal.SIGCONT)

    def _run(self, *command: str) -> subprocess.Popen[bytes]:
        with (self._folder / "output").open("ab") as output:
            return subprocess.Popen(
                # It ends with us in any case.
                ("setpriv", "--pdeathsig", "TERM", *command),
                env=self._env,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        """Whether the node answers the header that begins AMQP 0-9-1."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 2) as probe:
            probe.settimeout(2)
            probe.sendall(b"AMQP\x00\x00\x09\x01")
            return probe.recv(1) == b"\x01"
        return False

    def _output(self) -> str:
        return (self._folder / "output").read_text()[-2000:]
