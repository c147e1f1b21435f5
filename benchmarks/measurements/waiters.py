"""What clients that wait cost."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from benchmarks.load import fire
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
from benchmarks.memory import proportional_mib, resident_mib
from benchmarks.place import AGENT, Site, pause_until, running_alone

MEMORY = Target(
    "waiters: 1,000 on one front, its memory (all are answered)",
    first=at_most(200),
    then=None,
)
MANY = Target(
    "waiters: 10,000 on one front, its memory (all are answered)",
    first=None,
    then=at_most(200),
)
THREADS = Target("waiters: threads that 10,000 add to the front", first=at_most(0), then=at_most(0))


ARRIVALS_PER_S = 500.0


class _Waited(NamedTuple):
    """One round."""

    before_mib: float
    while_mib: float
    resident_mib: float
    threads_before: int
    threads_while: int
    released_s: float
    """From the moment the tasks were released until the last client had its answer."""


@measurement("waiters", MEMORY, MANY, THREADS)
def waiters(run: Run) -> Finding:
    """Let clients send `POST /process` and wait, each on its connection, on a paused queue.

    They come at 500 a second. When every task is there, the front's proportional set size and
    threads are read; then the queue is resumed, and every client must get its result. Each round
    has a system of its own: the allocator does not give all memory back.
    """
    few, many = run.size(1000, 100), run.size(10_000, 500)
    found: dict[int, list[_Waited]] = {few: [], many: []}
    for _ in range(run.rounds):
        for count, waited in found.items():
            with running_alone(run.folder) as site:
                waited.append(_wait(site, count))
            run.say(f"{count:,} waiting: {waited[-1].while_mib:.0f} MiB")
    added = [float(each.threads_while - each.threads_before) for each in found[many]]
    return Finding(
        rows=[
            MEMORY.row(Samples([each.while_mib for each in found[few]], "MiB")),
            MANY.row(Samples([each.while_mib for each in found[many]], "MiB")),
            THREADS.row(Samples(added, "threads")),
        ],
        tables=[
            Table(
                ("waiting", "PSS before", "PSS", "RSS", "threads before", "threads", "answered in"),
                [_cells(count, each) for count, waited in found.items() for each in waited],
            )
        ],
    )


def _wait(site: Site, count: int) -> _Waited:
    fire(site.trip_request(), 4, total=50).require("200")
    front = site.front()
    before, threads = proportional_mib([front]), front.num_threads()
    with ThreadPoolExecutor(1) as pool:
        with site.paused(), site.database() as connection:
            answers = pool.submit(
                fire, site.trip_request(300), count, total=count, arrivals_per_s=ARRIVALS_PER_S
            )

            def all_wait() -> bool:
                if answers.done():
                    answers.result().require("200")  # says what went wrong
                row = connection.execute(_QUEUED, (AGENT,)).fetchone()
                return row is not None and row[0] == count

            pause_until(all_wait, 120, f"{count} tasks wait")
            waited = (proportional_mib([front]), resident_mib(front), front.num_threads())
        released_at = time.monotonic()
        found = answers.result(300).require("200")
        took_s = time.monotonic() - released_at
    if len(found.latencies) != count:
        raise RuntimeError(f"{len(found.latencies)} of {count} clients were answered")
    return _Waited(before, waited[0], waited[1], threads, waited[2], took_s)


_QUEUED = "SELECT count(*) FROM tasks WHERE agent = %s AND state = 'queued'"


def _cells(count: int, waited: _Waited) -> list[str]:
    return [
        f"{count:,}",
        f"{waited.before_mib:.0f} MiB",
        f"{waited.while_mib:.0f} MiB",
        f"{waited.resident_mib:.0f} MiB",
        str(waited.threads_before),
        str(waited.threads_while),
        f"{number(waited.released_s)} s",
    ]
