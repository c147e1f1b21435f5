"""What the whole system costs while it has nothing to do."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import suppress

import psutil

from benchmarks.measurement import (
    Finding,
    Run,
    Samples,
    Table,
    Target,
    at_most,
    measurement,
    number,
)
from benchmarks.memory import proportional_mib
from benchmarks.place import start_system
from sutazai.embedded import Supervisor
from tests.acceptance.conftest import System, stop

PROCESSOR = Target(
    "idle: `sutazai up`, seven agents, Flower, both servers: processor",
    first=at_most(6),
    then=at_most(2),
)
MEMORY = Target("idle: proportional set size of all its processes", at_most(1200), at_most(700))


@measurement("idle", PROCESSOR, MEMORY)
def idle(run: Run) -> Finding:
    """Start the whole system and leave it alone.

    After it has settled, the processor time of all its processes, those that end meanwhile
    included, is taken over a minute, in percent of one core; then their memory.
    """
    settle_s, watch_s = (5.0, 5.0) if run.is_quick else (30.0, 60.0)
    percents: list[float] = []
    sizes: list[float] = []
    parts: list[list[str]] = []
    home = run.folder / "idle" / ".sutazai"
    home.parent.mkdir()
    system = start_system(home)
    try:
        time.sleep(settle_s)
        for _ in range(run.rounds):
            before = _spent(system)
            began = time.monotonic()
            time.sleep(watch_s)
            after = _spent(system)
            took_s = time.monotonic() - began
            spent = {name: after[name] - before.get(name, 0.0) for name in after}
            percents.append(100 * sum(spent.values()) / took_s)
            sizes.append(proportional_mib(_tree(system)))
            parts = _parts(system, spent, took_s)
            run.say(f"{percents[-1]:.1f} % of a core, {sizes[-1]:.0f} MiB")
    finally:
        stop(system)
    return Finding(
        rows=[PROCESSOR.row(Samples(percents, "%")), MEMORY.row(Samples(sizes, "MiB"))],
        tables=[Table(("program (last round)", "% of a core", "PSS"), parts)],
    )


def _tree(system: System) -> list[psutil.Process]:
    root = psutil.Process(system.process.pid)
    return [root, *root.children(recursive=True)]


def _programs(system: System) -> dict[str, list[psutil.Process]]:
    """Return the processes of each program; the rest are the supervisor's and the command's."""
    left = {process.pid: process for process in _tree(system)}
    found: dict[str, list[psutil.Process]] = {}
    for program in Supervisor(system.home).programs():
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(program.pid)
            own = [root, *root.children(recursive=True)]
            found[program.name] = [process for process in own if left.pop(process.pid, None)]
    found["up, supervisor"] = list(left.values())
    return found


def _spent(system: System) -> dict[str, float]:
    """Return the processor seconds of each program so far; ended children count by their parent."""
    spent: defaultdict[str, float] = defaultdict(float)
    for name, processes in _programs(system).items():
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                spent[name] += sum(process.cpu_times()[:4])
    return spent


def _parts(system: System, spent: dict[str, float], took_s: float) -> list[list[str]]:
    return [
        [name, number(100 * spent.get(name, 0.0) / took_s), f"{proportional_mib(own):.0f} MiB"]
        for name, own in _programs(system).items()
    ]
