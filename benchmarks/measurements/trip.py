"""How long one client waits for a result while nothing else is to be done."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.load import fire
from benchmarks.measurement import (
    Chart,
    Curve,
    Finding,
    Of,
    Run,
    Samples,
    Target,
    at_most,
    measurement,
)
from benchmarks.peers.peer import CARDS
from benchmarks.place import running_alone
from benchmarks.rival import Rival, trip_ms
from benchmarks.stores import stores

AGAINST = "Celery's delay().get(), Redis"
MEDIAN = Target(
    "round trip: `POST /process` that waits, p50",
    first=at_most(8),
    then=at_most(2, Of.DIFFERENCE),
    against=AGAINST,
)
SLOWEST = Target("round trip: p99", first=at_most(25), then=None, against=AGAINST)
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


@measurement("trip", MEDIAN, SLOWEST)
def trip(run: Run) -> Finding:
    """Send a task on one connection and wait for its result, again and again.

    The baseline is Celery as documented with Redis for results, which are signalled, not polled:
    no HTTP, and nothing durable.
    """
    trips = run.size(500, 50)
    p50: list[float] = []
    p99: list[float] = []
    [card] = [card for card in CARDS if card.name == "celery_redis"]
    rival = Rival(card)
    with ExitStack() as stack:
        site = stack.enter_context(running_alone(run.folder))
        own = stack.enter_context(stores(run.folder))
        wanted = site.trip_request()
        fire(wanted, 1, total=100).require("200")
        for _ in range(run.rounds):
            found = fire(wanted, 1, total=trips).require("200")
            p50.append(found.percentile_ms(50))
            p99.append(found.percentile_ms(99))
            shown = rival.play(own, 0, trips)
            theirs = trip_ms(shown, 50) if shown else None
            run.say(f"ours {p50[-1]:.1f} ms, Celery {theirs or rival.fault}")
    line = rival.line
    curves = [Curve("ours", PERCENTILES, [found.percentile_ms(each) for each in PERCENTILES])]
    if rival.figures:
        last = rival.figures[-1]
        curves.append(
            Curve("Celery", PERCENTILES, [trip_ms(last, each) or 0 for each in PERCENTILES])
        )
    return Finding(
        rows=[
            MEDIAN.row(Samples(p50, "ms"), line.trip_p50),
            SLOWEST.row(Samples(p99, "ms"), line.trip_p99),
        ],
        notes=[rival.fault] if rival.fault else [],
        charts=[
            Chart(
                "trip_latency",
                "Round trip on an idle system",
                "percentile",
                "ms",
                curves,
                log_x=False,
            )
        ],
    )
