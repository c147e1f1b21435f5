"""How many tasks a second batches hand over."""

from __future__ import annotations

from benchmarks.load import fire
from benchmarks.measurement import (
    Finding,
    Run,
    Samples,
    Table,
    Target,
    at_least,
    measurement,
)
from benchmarks.place import BATCH, running_alone

CONNECTIONS = (1, 2, 4)

RATE = Target(
    "bulk: `POST /tasks/batch` of 1,000, two connections",
    first=at_least(15_000),
    then=at_least(30_000),
)


@measurement("bulk", RATE)
def bulk(run: Run) -> Finding:
    """Hand batches of 1,000 tasks to one front, each batch durable before its answer.

    Nothing works the tasks off meanwhile, and each measurement begins with an empty table.
    """
    batches = run.size(60, 6)
    rates: dict[int, list[float]] = {connections: [] for connections in CONNECTIONS}
    slowest: dict[int, list[float]] = {connections: [] for connections in CONNECTIONS}
    with running_alone(run.folder) as site, site.without_worker():
        fire(site.batch_request(), 2, total=4).require("202")
        for _ in range(run.rounds):
            for connections in CONNECTIONS:
                site.clear()
                found = fire(site.batch_request(), connections, total=batches).require("202")
                rates[connections].append(BATCH * found.rate)
                slowest[connections].append(found.percentile_ms(99))
                run.say(f"{connections} connections: {BATCH * found.rate:,.0f} tasks/s")
    return Finding(
        rows=[RATE.row(Samples(rates[2], "/s"))],
        tables=[
            Table(
                ("connections", "tasks/s", "p99 of a batch"),
                [
                    [
                        str(connections),
                        str(Samples(rates[connections], "/s")),
                        str(Samples(slowest[connections], "ms")),
                    ]
                    for connections in CONNECTIONS
                ],
            )
        ],
    )
