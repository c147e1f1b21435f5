"""What a supervised process does between the fork and its work."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from sutazai.embedded.layout import Layout, lock, write_pid
from sutazai.embedded.program import Program, Run

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def reset(program: Program, parent: int) -> None:
    """Give back the signals that the supervisor changed, and end when the supervisor ends."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    if _prctl is not None:
        # A killed supervisor leaves no orphans. It comes after the change of user, which clears it.
        _prctl(_PR_SET_PDEATHSIG, int(program.stop_signal), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # the supervisor died before it could be watched
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def work(program: Program, layout: Layout, env: Mapping[str, str], run: Run) -> NoReturn:
    """Run the program's code in this fork and exit; nothing of the supervisor runs any more."""
    code = 1
    try:
        # What every Python process starts with.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        _renew_streams()
        _show_name(program.name)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = ["sutazai", *program.args]
        gc.enable()
        held = _hold(layout, program)
        code = run(list(program.args))
        del held
    except SystemExit as stop:
        code = _exit_code(stop)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        # Not sys.exit: the supervisor's exit handlers and frames are not this process's.
        os._exit(code)


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)  # noqa: T201 - what the interpreter does
    return 1


class _LogPipe(io.FileIO):
    """The pipe to the supervisor; lines that it no longer reads do not disturb the drain."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            return memoryview(data).nbytes


def _renew_streams() -> None:
    with open(os.devnull) as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(_LogPipe(number, "w", closefd=False)),
            encoding="utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )
        for number in (1, 2)
    )


def _show_name(name: str) -> None:
    """Show the program's name where tools show a process's short name."""
    if _prctl is not None:
        _prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def _hold(layout: Layout, program: Program) -> object:
    """Hold the program's lock for as long as this process or a fork of it lives."""
    try:
        file = (layout.locks / f"{program.name}.lock").open("a+")
    except PermissionError:  # the program runs as another user
        return None
    if lock(file):
        write_pid(file)
    return file
