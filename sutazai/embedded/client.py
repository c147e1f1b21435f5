"""Asking a running supervisor, from any process, over its socket in the home."""

from __future__ import annotations

import http.client
import socket
import xmlrpc.client
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sutazai.embedded.layout import Layout
from sutazai.embedded.program import missing_extra
from sutazai.errors import NotFound, Unavailable

# supervisor.xmlrpc.Faults; named here so that importing this module needs no extra.
_SHUTDOWN_STATE = 6
_BAD_NAME = 10
_ALREADY_STARTED = 60
_NOT_RUNNING = 70


@dataclass(frozen=True)
class ProgramState:
    """One program, as the supervisor sees it; `pid` 0 and `uptime_s` 0 when it does not run.

    state: STOPPED, STARTING, RUNNING, BACKOFF (ended too early, will be started again), STOPPING,
    EXITED, FATAL or UNKNOWN. exit_status: of the last end; -1 when a signal ended it.
    """

    name: str
    state: str
    pid: int
    uptime_s: float
    exit_status: int
    log: Path


class Supervisor:
    """The supervisor of a home; every method but `running` raises `Unavailable` without one.

    A supervisor that is stopping answers nothing else, so there too they raise it.
    """

    def __init__(self, home: Path, timeout_s: float = 60.0) -> None:
        self._layout = Layout(home)
        self._timeout_s = timeout_s

    def running(self) -> bool:
        """Whether a supervisor answers within two seconds, be it that it is stopping."""
        try:
            self._call("getPID", allowed=_SHUTDOWN_STATE, timeout_s=2.0)
        except Unavailable:
            return False
        return True

    def programs(self) -> list[ProgramState]:
        """Return every program, in the order of their priority."""
        return [self._state(info) for info in self._call("getAllProcessInfo")]

    def start(self, name: str) -> None:
        """Start a program, if it does not run, and wait until it has lived for its `start_s`."""
        self._call("startProcess", self._full_name(name), allowed=_ALREADY_STARTED)

    def start_all(self) -> None:
        """Start every program that does not run, and return at once."""
        self._call("startAllProcesses", False)

    def stop(self, name: str) -> None:
        """Stop a program, if it runs, and wait until it has ended; it stays stopped."""
        self._call("stopProcess", self._full_name(name), allowed=_NOT_RUNNING)

    def restart(self, name: str) -> None:
        """Stop a program, waiting for it to drain, and start it again."""
        self.stop(name)
        self.start(name)

    def shutdown(self, wait_s: float = 0.0) -> None:
        """Stop everything in order; wait_s: wait so long for the end, else raise `Unavailable`."""
        process = None
        with suppress(OSError, ValueError, psutil.NoSuchProcess):
            process = psutil.Process(int(self._layout.pidfile.read_text()))
        self._call("shutdown", allowed=_SHUTDOWN_STATE)
        if not wait_s or process is None:
            return
        try:
            process.wait(wait_s)
        except psutil.TimeoutExpired:
            raise Unavailable(
                f"The supervisor {process.pid} has not ended in {wait_s:g} s."
            ) from None

    def _full_name(self, name: str) -> str:
        for info in self._call("getAllProcessInfo"):
            if info["name"] == name:
                return f"{info['group']}:{name}"
        raise NotFound(f"The supervisor has no program {name!r}.")

    def _state(self, info: dict[str, Any]) -> ProgramState:
        return ProgramState(
            name=info["name"],
            state=info["statename"],
            pid=info["pid"],
            uptime_s=float(max(0, info["now"] - info["start"])) if info["pid"] else 0.0,
            exit_status=info["exitstatus"],
            log=self._layout.log(info["name"]),
        )

    def _call(
        self, method: str, *args: Any, allowed: int | None = None, timeout_s: float | None = None
    ) -> Any:
        transport = _transport(self._layout.socket, timeout_s or self._timeout_s)
        # The address is not used: the transport knows the socket.
        proxy = xmlrpc.client.ServerProxy("http://supervisor", transport=transport)
        try:
            return getattr(proxy.supervisor, method)(*args)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == allowed:
                return None
            raise self._refused(fault, args) from None
        except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
            raise Unavailable(
                f"No supervisor answers for {self._layout.home} ({error}): run `sutazai up`."
            ) from None
        finally:
            transport.close()

    def _refused(self, fault: xmlrpc.client.Fault, args: tuple[str, ...]) -> Exception:
        if fault.faultCode == _SHUTDOWN_STATE:
            return Unavailable("The supervisor is stopping.")
        if fault.faultCode == _BAD_NAME:
            return NotFound(f"The supervisor has no program {args[0]!r}.")
        where = f"; see {self._layout.log(args[0].split(':')[-1])}" if args else ""
        return Unavailable(f"The supervisor refused: {fault.faultString}{where}")


def _transport(path: Path, timeout_s: float) -> Any:
    """Return supervisord's own transport, with the time limit that it lacks."""
    try:
        from supervisor.xmlrpc import SupervisorTransport  # noqa: PLC0415 - needs the extra
    except ModuleNotFoundError:
        raise missing_extra("supervisor") from None

    def connect() -> http.client.HTTPConnection:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(timeout_s)
        try:
            link.connect(str(path))
        except OSError:
            link.close()
            raise
        connection = http.client.HTTPConnection("localhost")
        connection.sock = link
        return connection

    transport = SupervisorTransport(serverurl=f"unix://{path}")
    transport._get_connection = connect
    return transport
