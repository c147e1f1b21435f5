"""What is left of `sutazai up` once everything runs: it hands signals on, and waits.

`stay` runs this file by itself, without the package: what was loaded to start the system, and to be
shared by its processes, would lie there unused for as long as the system runs.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def forward_signals(child: int) -> list[int]:
    """Hand SIGINT and SIGTERM on to the supervisor from now on; the list grows with each."""
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        is_first = not received
        received.append(number)
        stop(child)  # at once: nobody may be left to read what is said
        if is_first:  # another signal may have come meanwhile
            with suppress(OSError, RuntimeError):
                sys.stderr.write("\nStopping; running tasks are drained. Again: stop at once.\n")
                sys.stderr.flush()

    for number in SIGNALS:
        signal.signal(number, forward)
    return received


def forget_signals() -> None:
    """Let signals do what they usually do: they are no business of the supervisor's any more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def stop(child: int) -> None:
    """Ask the supervisor to stop everything."""
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGTERM)


def await_end(child: int) -> int:
    """Wait until the supervisor has ended; return its exit code, or 1 if nobody knows it."""
    try:
        _, status = os.waitpid(child, 0)
    except ChildProcessError:
        return 1
    return os.waitstatus_to_exitcode(status)


def stay(child: int) -> NoReturn:
    """Become a process of a few megabytes that hands signals on until the supervisor ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they wait until somebody hears them
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-I", "-S", __file__, str(child)]
    os.execv(sys.executable, command)  # noqa: S606 - our own file


def _main(child: int) -> int:
    with suppress(OSError), open("/proc/self/comm", "w") as name:  # noqa: PTH123 - costs memory
        name.write("sutazai up")
    forward_signals(child)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return await_end(child)


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1])))
