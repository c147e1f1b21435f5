"""How fast a backlog is worked off."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.measurement import (
    Finding,
    Of,
    PeerLine,
    Run,
    Samples,
    Table,
    Target,
    at_least,
    measurement,
)
from benchmarks.peers.peer import CARDS
from benchmarks.place import running_alone
from benchmarks.rival import Rival
from benchmarks.stores import stores

DURABLE = Target(
    "drain: a backlog of 10,000 trivial tasks, two worker processes",
    first=at_least(4, Of.RATIO),
    then=None,
    against="Celery with acks_late, PostgreSQL",
)
DRAMATIQ = Target(
    "drain: the same beside Dramatiq",
    first=None,
    then=at_least(1, Of.RATIO),
    against="Dramatiq, Redis",
)
HUEY = Target(
    "drain: the same beside Huey, which promises nothing",
    first=None,
    then=at_least(1, Of.RATIO),
    against="Huey, Redis",
)
_BASELINES = {"celery_durable": DURABLE, "dramatiq_redis": DRAMATIQ, "huey_redis": HUEY}


@measurement("drain", DURABLE, DRAMATIQ, HUEY)
def drain(run: Run) -> Finding:
    """Gather a backlog while nothing works on it, then let it go.

    Ours counts from the moment the queue is resumed until the last task has finished, by
    PostgreSQL's clock, so the wait for the first notice is in it. Every peer has the same stores,
    the same task, two worker processes, and keeps its results; it counts from its first result to
    its last, so that the start of its workers is not in it. A peer that is not installed or fails
    is named in the table of peers.
    """
    tasks, trips = run.size(10_000, 1000), run.size(200, 20)
    rates: list[float] = []
    working: list[float] = []
    rivals = [Rival(card) for card in CARDS]
    with ExitStack() as stack:
        site = stack.enter_context(running_alone(run.folder))
        own = stack.enter_context(stores(run.folder))
        site.drain(1000)
        for _ in range(run.rounds):
            site.clear()
            found = site.drain(tasks)
            rates.append(found.rate)
            working.append(found.working_rate)
            run.say(f"ours: {found.rate:,.0f}/s")
            for rival in rivals:
                shown = rival.play(own, tasks, trips)
                rate = shown.drain_per_s if shown else None
                run.say(f"{rival.title}: {f'{rate:,.0f}/s' if rate else rival.fault}")
    ours = Samples(rates, "/s")
    drained = {rival.card.name: rival.drain for rival in rivals}
    return Finding(
        rows=[target.row(ours, drained[name]) for name, target in _BASELINES.items()],
        peers=[_own_line(ours), *(rival.line for rival in rivals)],
        tables=[
            Table(
                ("ours", "tasks/s"),
                [
                    ["from resuming to the last end", str(ours)],
                    ["from the first end to the last", str(Samples(working, "/s"))],
                ],
            )
        ],
    )


def _own_line(ours: Samples) -> PeerLine:
    return PeerLine("SutazAI", "PostgreSQL", "yes, yes", drain=ours)
