"""How long it takes until everything is healthy."""

from __future__ import annotations

import time

from benchmarks.measurement import Finding, Run, Samples, Target, at_most, measurement
from benchmarks.place import start_system
from tests.acceptance.conftest import stop

FRESH = Target("start: `sutazai up` in a fresh home until all is healthy", at_most(12), at_most(6))
AGAIN = Target("start: the second one in the same home", at_most(12), at_most(6))


@measurement("start", FRESH, AGAIN)
def start(run: Run) -> Finding:
    """Take the time from running the command until its table of URLs: all agents, Flower.

    The dependencies are installed and compiled. A fresh home has its PostgreSQL made first.
    """
    fresh: list[float] = []
    again: list[float] = []
    for number in range(run.rounds):
        home = run.folder / f"start-{number}" / ".sutazai"
        home.parent.mkdir()
        for times in (fresh, again):
            began = time.monotonic()
            system = start_system(home)
            times.append(time.monotonic() - began)
            stop(system)
        run.say(f"fresh {fresh[-1]:.1f} s, again {again[-1]:.1f} s")
    return Finding(rows=[FRESH.row(Samples(fresh, "s")), AGAIN.row(Samples(again, "s"))])
