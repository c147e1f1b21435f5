"""supervisord in this process, in the foreground, with programs that are forks of this process.

supervisord's options class is its one seam: everything that it does to the operating system is a
method of it. Ours builds the groups from `Program`s instead of a file, and where supervisord would
execute a program, runs our own code in the child.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from supervisor import loggers
from supervisor.datatypes import RestartUnconditionally
from supervisor.medusa import asyncore_25
from supervisor.options import (
    ProcessConfig,
    ProcessGroupConfig,
    ServerOptions,
    SignalReceiver,
    decode_wait_status,
)
from supervisor.process import Subprocess
from supervisor.states import ProcessStates, SupervisorStates
from supervisor.supervisord import Supervisor as Supervisord

from sutazai.embedded import child
from sutazai.embedded.layout import Layout
from sutazai.embedded.leftovers import clear
from sutazai.embedded.program import Program, Run
from sutazai.errors import ConfigurationError

LOG_BYTES = 10_000_000
LOG_FILES = 3
POLL_S = 0.1
"""How late supervisord may notice that a pause is over; at rest it looks each second."""

_AT_REST = (ProcessStates.RUNNING, ProcessStates.STOPPED)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
FORCED_STOP_S = 2.0
SECOND_SIGNAL_AFTER_S = 0.5
"""timeout(1) and some shells signal a process twice, by its id and by its group."""

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_CONFIG = """\
[supervisord]
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
"""


def supervise(home: Path, programs: Sequence[Program], run: Run) -> int:
    """Do what `sutazai.embedded.supervise` says."""
    if threading.active_count() > 1:
        raise RuntimeError(f"Cannot fork beside the threads {threading.enumerate()}")
    layout = Layout(home)
    layout.make()
    with layout.exclusive():
        clear(layout)
        return _run(_Options(layout, programs, run))


def _run(options: _Options) -> int:
    supervisor = _Supervisor(options)
    poll = options.poller.poll = _Poll(supervisor)
    sys.stdout.flush()
    sys.stderr.flush()
    # What exists now stays in pages that children share, as no collection writes to it any more.
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        supervisor.main()
    except asyncore_25.ExitNow:
        pass
    finally:
        gc.unfreeze()
        gc.enable()
        poll.close()
        options.close()
    return 1 if supervisor.forced else 0


class _Signals(SignalReceiver):  # type: ignore[misc]
    """Queues signals for the main loop, and notes a second wish to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.first_stop: float | None = None
        self.insisted = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGHUP:
            return  # supervisord would restart; a closed terminal stops nothing
        if number in _STOP_SIGNALS:
            if self.first_stop is None:
                self.first_stop = now
            elif now - self.first_stop > SECOND_SIGNAL_AFTER_S:
                self.insisted = True
        super().receive(number, frame)


class _Supervisor(Supervisord):  # type: ignore[misc]
    """supervisord that stops at once when it is told twice."""

    forced = False

    def handle_signal(self) -> None:
        super().handle_signal()
        if self.options.signal_receiver.insisted and not self.forced:
            self.forced = True
            self.options.logger.critical("told twice to stop: stopping everything at once")
            for group in self.process_groups.values():
                for process in group.processes.values():
                    process.stop_at_once()

    def is_at_rest(self) -> bool:
        """Whether nothing happens unless a signal or a client comes."""
        groups = self.process_groups.values()
        clients = len(self.options.get_socket_map()) - len(self.options.httpservers)
        return (
            self.options.mood == SupervisorStates.RUNNING
            and not clients
            and all(
                process.is_at_rest() for group in groups for process in group.processes.values()
            )
        )


class _Poll:
    """Waits as supervisord does, and a shorter time while something goes on or when a signal comes.

    supervisord finds out by its timeout alone that a signal has come.
    """

    def __init__(self, supervisor: _Supervisor) -> None:
        self._supervisor = supervisor
        self._poller = supervisor.options.poller
        self._wait = self._poller.poll
        self._signals, self._signalled = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(self._signalled, False)
        signal.set_wakeup_fd(self._signalled, warn_on_full_buffer=False)
        self._poller.register_readable(self._signals)
        self._is_due = True

    def __call__(self, timeout: float) -> tuple[list[int], list[int]]:
        """Return what can be read and what can be written."""
        if self._is_due:
            timeout = 0  # what a signal was about is found in its turn, and seen to in the next one
        elif not self._supervisor.is_at_rest():
            timeout = POLL_S
        readable, writable = self._wait(timeout)
        self._is_due = self._signals in readable
        if self._is_due:
            readable.remove(self._signals)
            os.read(self._signals, 4096)
        return readable, writable

    def close(self) -> None:
        """Leave signals alone again."""
        signal.set_wakeup_fd(-1)
        os.close(self._signals)
        os.close(self._signalled)


class _Log(loggers.Logger):  # type: ignore[misc]
    """A log that loses lines while they cannot be written, as on a full disk, and ends nothing.

    supervisord's own prints a traceback instead, which on a full disk fails too: then it would stop
    reading what a program prints, which blocks the program, or end together with all programs.
    """

    handlers: list[loggers.FileHandler]
    lost = 0

    def addHandler(self, handler: Any) -> None:  # noqa: N802 - supervisord's name
        handler.handleError = _raise_again
        super().addHandler(handler)

    def log(self, level: int, msg: Any, **kw: Any) -> None:
        """Write a line, or count it as lost."""
        if not self._write(level, msg, **kw):
            self.lost += 1
        elif self.lost and self._write(loggers.LevelsByName.WARN, f"{self.lost} writes lost\n"):
            self.lost = 0

    def _write(self, level: int, msg: Any, **kw: Any) -> bool:
        try:
            super().log(level, msg, **kw)
        except (OSError, ValueError):  # ValueError: it could not be opened again
            for handler in self.handlers:
                self._renew(handler)
            return False
        return True

    @staticmethod
    def _renew(handler: Any) -> None:
        """Open a file again: one that failed to be rotated is closed, or has a rest to write."""
        with suppress(OSError):
            handler.stream.close()
        with suppress(OSError):
            handler.stream = open(handler.baseFilename, "ab")  # noqa: PTH123, SIM115


def _raise_again() -> None:
    """Take the place of a handler's printing of the error that is being handled."""
    raise  # noqa: PLE0704 - called while one is handled


class _Process(Subprocess):  # type: ignore[misc]
    """One process of a program."""

    backoff: int
    exitstatus: int
    delay: float

    @property
    def program(self) -> Program:
        program: Program = self.config.program
        return program

    def is_at_rest(self) -> bool:
        """Whether nothing is to be done for it unless a signal or a client comes."""
        once = ProcessStates.EXITED if not self.config.autorestart else None
        return self.state in (*_AT_REST, once)

    def get_execv_args(self) -> tuple[str, list[str]]:
        """Return file and arguments as they are, without supervisord's parsing of a line."""
        if self.program.args:
            return self.program.name, list(self.program.args)
        argv = list(self.program.argv)
        self.config.options.check_execv_args(argv[0], argv, _stat(argv[0]))
        return argv[0], argv

    def change_state(self, new_state: int, expected: bool = True) -> Any:
        """Bound the pause before the next start, which in supervisord grows without end."""
        result = super().change_state(new_state, expected)
        if new_state == ProcessStates.BACKOFF:
            self.backoff = min(self.backoff, 8)
            self.delay = time.time() + min(FIRST_PAUSE_S * 2 ** (self.backoff - 1), LONGEST_PAUSE_S)
        return result

    def finish(self, pid: int, status: int) -> None:
        """Keep the exit status, which supervisord forgets after an early end."""
        super().finish(pid, status)
        self.exitstatus = decode_wait_status(status)[0]

    def stop_at_once(self) -> None:
        """Send the signal that ends the program without draining, and SIGKILL soon after."""
        self.kill(self.program.kill_signal)
        if self.pid:
            self.delay = time.time() + FORCED_STOP_S


class _ProcessConfig(ProcessConfig):  # type: ignore[misc]
    """A program, as supervisord wants it."""

    def __init__(self, options: _Options, program: Program) -> None:
        self.program = program
        values = dict.fromkeys(self.req_param_names)
        values |= {
            "name": program.name,
            "uid": program.user,
            "command": " ".join(program.argv or program.args),
            "priority": program.priority,
            "autostart": program.autostart,
            "autorestart": RestartUnconditionally if program.autorestart else False,
            # Without restarts, an early end is an end, not a reason to try again.
            "startsecs": program.start_s if program.autorestart else 0,
            "startretries": sys.maxsize,
            "stdout_logfile": str(options.layout.log(program.name)),
            "stdout_logfile_maxbytes": LOG_BYTES,
            "stdout_logfile_backups": LOG_FILES,
            "stdout_capture_maxbytes": 0,
            "redirect_stderr": True,
            "stopsignal": program.stop_signal,
            "stopwaitsecs": program.stop_wait_s,
            "stopasgroup": False,
            "killasgroup": True,
            "exitcodes": [0],
            "environment": dict(program.env),
        }
        super().__init__(options, **values)

    def make_process(self, group: Any = None) -> _Process:
        process = _Process(self)
        process.group = group
        return process


class _Options(ServerOptions):  # type: ignore[misc]
    """supervisord's configuration and its access to the operating system."""

    logger: Any

    def __init__(self, layout: Layout, programs: Sequence[Program], run: Run) -> None:
        super().__init__()
        self.layout = layout
        self.programs = {program.name: program for program in programs}
        if len(self.programs) < len(programs):
            raise ConfigurationError("Two programs have the same name.")
        self.run = run
        self.first = True
        self.test = False
        self.signal_receiver = _Signals()
        self.configfile = io.StringIO(_CONFIG)
        self.realize(["--nodaemon", "--silent", "--nocleanup"], doc="")
        self.logfile = str(layout.log("supervisord"))
        self.logfile_maxbytes = LOG_BYTES
        self.logfile_backups = LOG_FILES
        self.pidfile = str(layout.pidfile)

    def usage(self, msg: str) -> NoReturn:
        raise ConfigurationError(f"supervisord cannot start: {msg}")

    def process_groups_from_parser(self, parser: Any) -> list[Any]:  # noqa: ARG002
        names = dict.fromkeys(program.group for program in self.programs.values())
        groups = []
        for name in names:
            members = [p for p in self.programs.values() if p.group == name]
            priority = min(program.priority for program in members)
            configs = [_ProcessConfig(self, program) for program in members]
            groups.append(ProcessGroupConfig(self, name, priority, configs))
        return groups

    def server_configs_from_parser(self, parser: Any) -> list[dict[str, Any]]:  # noqa: ARG002
        return [
            {
                "name": "unix_http_server",
                "section": "unix_http_server",
                "family": socket.AF_UNIX,
                "file": str(self.layout.make_socket_path()),
                "chmod": 0o700,
                "chown": (-1, -1),
                "username": None,
                "password": None,
            }
        ]

    def getLogger(self, level: int | None = None) -> _Log:  # noqa: N802 - supervisord's name
        """Return the log of a program."""
        return _Log(level)

    def make_logger(self) -> None:
        """Open supervisord's own log."""
        super().make_logger()
        handlers: list[Any] = self.logger.handlers
        self.logger = self.getLogger(self.loglevel)
        for handler in handlers:
            self.logger.addHandler(handler)

    def set_uid_or_exit(self) -> None:
        """Stay who we are, without supervisord's warning about root."""

    def fork(self) -> int:
        """Fork with signals held back, so that the child gets none before it is ready for them."""
        self.parent = os.getpid()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid != 0:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid

    def execve(self, filename: str, argv: list[str], env: Mapping[str, str]) -> NoReturn:
        program = self.programs[env["SUPERVISOR_PROCESS_NAME"]]
        child.reset(program, self.parent)
        if program.args:
            child.work(program, self.layout, env, self.run)
        os.execve(filename, argv, env)  # noqa: S606 - the point of this method

    def waitpid(self) -> tuple[int | None, int | None]:
        """Reap one child, and end what remains of its process group: nothing outlives its main."""
        pid, status = super().waitpid()
        if pid and pid in self.pidhistory:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        return pid, status

    def close(self) -> None:
        """Close what supervisord leaves open, and remove the socket's folder."""
        self.close_httpservers()
        if hasattr(self, "logger"):
            self.close_logger()
        self.layout.remove_socket()


def _stat(path: str) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except OSError:
        return None
