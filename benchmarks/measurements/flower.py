"""What it costs that Flower watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx

from benchmarks.measurement import (
    Finding,
    Of,
    Run,
    Samples,
    Target,
    at_least,
    measurement,
)
from benchmarks.place import AGENT, Site, pause_until, running

RATE = Target(
    "flower: drain of 10,000 while Flower watches",
    first=at_least(0.5, Of.RATIO),
    then=at_least(0.8, Of.RATIO),
    against="without Flower",
)


@measurement("flower", RATE)
def flower(run: Run) -> Finding:
    """Drain the same backlog with Flower watching, and without it.

    Flower has turned the workers' task events on, and has seen every task in the end, or the
    measurement fails. Each has a system of its own in each round.
    """
    tasks = run.size(10_000, 1000)
    watched: list[float] = []
    alone: list[float] = []
    for number in range(run.rounds):
        with _system(run, f"alone-{number}", "--no-flower") as site:
            site.drain(1000)
            alone.append(site.drain(tasks).rate)
        with _system(run, f"watched-{number}") as site:
            _await_watching(site)
            wanted = _seen(site) + tasks
            watched.append(site.drain(tasks).rate)
            pause_until(partial(_has_seen, site, wanted), 60, "Flower has seen all")
        run.say(f"alone {alone[-1]:,.0f}/s, watched {watched[-1]:,.0f}/s")
    return Finding(rows=[RATE.row(Samples(watched, "/s"), Samples(alone, "/s"))])


@contextmanager
def _system(run: Run, name: str, *arguments: str) -> Iterator[Site]:
    home = run.folder / name / ".sutazai"
    home.parent.mkdir()
    with running(home, "--agents", AGENT, *arguments) as site:
        yield site


def _await_watching(site: Site) -> None:
    """Drain small backlogs until Flower sees their tasks."""
    before = _seen(site)

    def sees() -> bool:
        site.drain(100)
        return _seen(site) > before

    pause_until(sees, 60, "Flower watches the worker", every_s=1.0)


def _has_seen(site: Site, count: float) -> bool:
    return _seen(site) >= count


def _seen(site: Site) -> float:
    """Return how many successes Flower has counted."""
    metrics = httpx.get(f"{site.url_of('flower')}/metrics", timeout=20).text
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith("flower_events_total{") and 'type="task-succeeded"' in line
    )
