"""A supervised home as a process of its own: `python supervised.py HOME PORT PORT [--no-servers]`.

The programs report on their standard output, so what they did stands in their logs.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import TextIO

from sutazai import embedded

STARTED_AT = time.monotonic()


def say(line: str, stream: TextIO | None = None) -> None:
    """Write a line into this program's log."""
    (stream or sys.stdout).write(line + "\n")


def run(args: list[str]) -> int:
    """Be one of the programs."""
    if args[0] == "crash":
        say("crashed")
        return 3
    if args[0] == "chatty":
        for number in itertools.count():
            say(f"line {number}")
            time.sleep(0.01)
    deaf = args[0] == "deaf"
    signal.signal(signal.SIGTERM, lambda *_: None if deaf else sys.exit(0))
    offspring = os.fork()
    while not offspring:
        time.sleep(1)
    now = time.monotonic()
    say(f"pid {os.getpid()} offspring {offspring} argv {sys.argv} at {now}")
    say(f"env {os.environ.get('COLOUR')} stdin {sys.stdin.read()!r}", sys.stderr)
    try:
        while True:
            time.sleep(0.02)
    finally:
        say("drained")
        os.kill(offspring, signal.SIGKILL)


def programs(home: Path, ports: list[int]) -> list[embedded.Program]:
    """Return the servers, unless they are not wanted, and some programs of our own."""
    ours = [
        embedded.Program(name="steady", args=("steady", "x y"), env={"COLOUR": "50% red"}),
        embedded.Program(name="crash", args=("crash",), autostart=False),
        embedded.Program(name="chatty", args=("chatty",), autostart=False),
        embedded.Program(name="deaf", args=("deaf",), autostart=False),
    ]
    if not ports:
        return ours
    embedded.prepare(home, *ports)
    return [*embedded.server_programs(home), *ours]


def main() -> int:
    """Supervise until stopped."""
    home, *ports = sys.argv[1:]
    return embedded.supervise(Path(home), programs(Path(home), [int(p) for p in ports]), run)


if __name__ == "__main__":
    sys.exit(main())
