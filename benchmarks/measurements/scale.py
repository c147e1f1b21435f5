"""What a long history and a large backlog cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from benchmarks.filling import fill_backlog, fill_history, settle
from benchmarks.load import Request, fire, request
from benchmarks.measurement import (
    Chart,
    Curve,
    Finding,
    Of,
    Run,
    Samples,
    Table,
    Target,
    at_most,
    measurement,
    number,
)
from benchmarks.place import AGENT, BATCH, Site, pause_until, running
from sutazai.bell import TOGETHER_MAX, WINDOW_MAX

EXPORTER = "ai-metrics-exporter"
CLAIMED = 5_000
PAGE = 50
MIB = 2**20

WITHIN, LATER = at_most(1.5, Of.RATIO), at_most(1.2, Of.RATIO)
EMPTY = "the empty table"
COSTS = {
    "accept": Target("scale: time to accept one task", WITHIN, LATER, EMPTY),
    "claim": Target("scale: time to claim and finish one task", WITHIN, LATER, EMPTY),
    "list": Target("scale: `GET /tasks`, p50", WITHIN, LATER, EMPTY),
    "scrape": Target("scale: `GET /metrics`, p50", WITHIN, LATER, EMPTY),
    "exporter": Target("scale: `GET :11063/metrics`, p50", WITHIN, LATER, EMPTY),
}
BROKER = Target("scale: the broker's memory, 1,000,000 queued", at_most(50), at_most(50))
FETCHED = 8 * TOGETHER_MAX
"""Tasks that a worker of two slots holds: four messages a slot."""

_ORDERLY = at_most(WINDOW_MAX + FETCHED)
ORDER = Target("scale: places by which a claim is out of order", _ORDERLY, _ORDERLY)

_LISTS = {
    "newest": "",
    "succeeded": "&state=succeeded",
    "failed": "&state=failed",
    "running": "&state=running",
    "another action": "&action=describe",
    "a label": "&label=colour=red",
    "all agents": "&agent=*",
}


@dataclass
class _Costs:
    """What one operation costs in ms, each round, here and on the empty table."""

    here: list[float] = field(default_factory=list)
    empty: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return Samples(self.here, "ms").median / Samples(self.empty, "ms").median


@dataclass
class _Point:
    """All operations at one size."""

    size: int
    costs: dict[str, _Costs] = field(default_factory=lambda: {name: _Costs() for name in COSTS})


@dataclass(frozen=True)
class _Systems:
    """The two that are compared, and a superuser's connection to the large one's database."""

    empty: Site
    large: Site
    database: psycopg.Connection[Any]


@measurement("scale", *COSTS.values(), BROKER, ORDER)
def scale(run: Run) -> Finding:
    """Compare a system with a growing table to one whose table is empty, in turns.

    First ended tasks are added, each with its attempt; then, on the largest table, tasks that wait,
    a tenth of them of each priority. At every size single tasks are accepted on 16 connections
    while the queue is paused, 5,000 tasks (1,000 of a backlog of that size) are claimed and
    finished by two worker processes, pages of tasks are listed, and metrics scraped. The tables are
    vacuumed and analysed after each step, and the other system's are emptied before each round, but
    for a page of tasks. The order of claims is compared with priority, then age: a task that is
    claimed earlier or later than that is out of order by so many places; the notices that the
    broker may hold, and the tasks of the messages that a worker has fetched, allow for 1,128. The
    rows of the table of targets are those of the largest table with the largest backlog.
    """
    sizes = (0, 1_000, 10_000) if run.is_quick else (0, 100_000, 1_000_000, 10_000_000)
    backlogs = (1_000, 10_000) if run.is_quick else (1_000, 10_000, 100_000, 1_000_000)
    by_size: list[_Point] = []
    by_backlog: list[_Point] = []
    with _system(run, "empty") as empty, _system(run, "large") as large:
        for site in (empty, large):
            site.drain(CLAIMED)  # a first time is slower
        used = _broker_mib(large)
        with large.database(superuser=True) as database:
            systems = _Systems(empty, large, database)
            have = 0
            for size in sizes:
                large.post("/queue/pause")
                fill_history(database, have, size, run.say)
                have = size
                by_size.append(_compare(run, systems, size, 0))
            by_backlog += [_compare(run, systems, sizes[-1], backlog) for backlog in backlogs]
            lists = _lists(empty, large)
            displaced, passed_over = _order(large, database)
        most = _broker_mib(large, "used_memory_peak")
    last = by_backlog[-1].costs
    return Finding(
        rows=[
            *(
                target.row(Samples(last[name].here, "ms"), Samples(last[name].empty, "ms"))
                for name, target in COSTS.items()
            ),
            BROKER.row(Samples([most], "MiB")),
            ORDER.row(Samples([float(displaced)], "places")),
        ],
        tables=[
            _table("ended tasks", by_size),
            _table(f"waiting tasks, beside {sizes[-1]:,} ended ones", by_backlog),
            Table(("GET /tasks, p50", "large", "empty"), lists),
        ],
        notes=[
            f"The broker held {used:.1f} MiB at rest, and never more than {most:.1f} MiB, up to "
            f"{backlogs[-1]:,} tasks queued. Of the tasks claimed from that backlog, "
            f"{displaced} places is the most that one was out of order; {passed_over} still wait "
            "that should have gone before the last of them."
        ],
        charts=[
            _chart("scale_table", "Cost against the size of the table", "ended tasks", by_size),
            _chart("scale_backlog", "Cost against the backlog", "waiting tasks", by_backlog),
        ],
    )


@contextmanager
def _system(run: Run, name: str) -> Iterator[Site]:
    home = run.folder / f"scale-{name}" / ".sutazai"
    home.parent.mkdir()
    with running(home, "--agents", f"{AGENT},{EXPORTER}", "--no-flower") as site:
        yield site


def _compare(run: Run, systems: _Systems, size: int, backlog: int) -> _Point:
    point = _Point(backlog or size)
    large, database = systems.large, systems.database
    with systems.empty.database(superuser=True) as own:
        claims = min(run.size(CLAIMED, 500), backlog or CLAIMED)
        for _ in range(run.rounds):
            own.execute("TRUNCATE tasks, attempts")
            fill_history(own, 0, 2 * PAGE, run.say)  # so that both list a whole page
            for site, connection in ((large, database), (systems.empty, own)):
                site.post("/queue/pause")
                fill_backlog(connection, backlog if site is large else 0)
                for name, cost_ms in _costs(run, site, connection, claims).items():
                    costs = point.costs[name]
                    (costs.here if site is large else costs.empty).append(cost_ms)
    said = ", ".join(f"{name} {costs.ratio:.2f} ×" for name, costs in point.costs.items())
    run.say(f"{size:,} ended, {backlog:,} waiting: {said}")
    return point


def _costs(
    run: Run, site: Site, connection: psycopg.Connection[Any], claims: int
) -> dict[str, float]:
    """Return what each operation costs, in ms; the queue is paused before and after."""
    reads = run.size(50, 20)
    accept_ms = _accept(site, connection, run.seconds(4))
    return {
        "accept": accept_ms,
        "list": _median_ms(request("GET", f"{site.url}/tasks?limit={PAGE}"), reads),
        "scrape": _median_ms(request("GET", f"{site.url}/metrics"), reads),
        "exporter": _median_ms(request("GET", f"{site.url_of(EXPORTER)}/metrics"), reads),
        "claim": _claim(site, connection, claims),
    }


def _median_ms(wanted: Request, total: int) -> float:
    fire(wanted, 1, total=5).require("200")
    return fire(wanted, 1, total=total).require("200").percentile_ms(50)


def _accept(site: Site, connection: psycopg.Connection[Any], seconds: float) -> float:
    """Accept tasks and delete them again, so that the backlog stays what it is."""
    first = connection.execute("SELECT uuidv7()").fetchone()
    found = fire(site.accept_request(), 16, seconds=seconds).require("202")
    connection.execute("DELETE FROM tasks WHERE task_id > %s", first)
    settle(connection)
    return 1000 / found.rate


def _claim(site: Site, connection: psycopg.Connection[Any], count: int) -> float:
    """Let so many tasks or some more be worked off, and return what one takes."""
    row = connection.execute(_QUEUED, (AGENT, count)).fetchone()
    if row is None or row[0] < count:
        body = [{"action": AGENT}] * min(BATCH, count)
        batch = request("POST", f"{site.url}/tasks/batch", body)
        fire(batch, 1, total=-(-count // BATCH)).require("202")
    now = connection.execute("SELECT clock_timestamp()").fetchone()
    assert now is not None

    def finished() -> Sequence[Any]:
        return connection.execute(_FINISHED, (AGENT, now[0], count)).fetchone() or (0, 0.0)

    site.post("/queue/resume")
    pause_until(lambda: finished()[0] >= count, 300, f"{count} tasks have ended", every_s=0.1)
    site.post("/queue/pause")
    _await_quiet(connection)
    done, seconds = finished()
    return 1000 * float(seconds) / (int(done) - 1)


def _await_quiet(connection: psycopg.Connection[Any]) -> None:
    def is_quiet() -> bool:
        row = connection.execute("SELECT 1 FROM tasks WHERE state = 'running' LIMIT 1").fetchone()
        return row is None

    pause_until(is_quiet, 30, "nothing runs", every_s=0.1)


_QUEUED = """
    SELECT count(*)
    FROM (SELECT 1 FROM tasks WHERE agent = %s AND state = 'queued' LIMIT %s) AS bounded
"""

_FINISHED = """
    SELECT count(*), extract(epoch FROM max(finished_at) - min(finished_at))
    FROM (SELECT finished_at FROM tasks WHERE agent = %s AND finished_at > %s
          ORDER BY finished_at LIMIT %s) AS first
"""


def _order(site: Site, connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """Let some of the largest backlog go; return by how many places a claim was out of order.

    Also how many still wait that should have gone before the last one that was claimed.
    """
    now = connection.execute("SELECT clock_timestamp()").fetchone()
    _claim(site, connection, CLAIMED)
    claimed = connection.execute(_CLAIMED, now).fetchall()
    order = {task_id: place for place, (task_id, _) in enumerate(sorted(claimed, key=_due))}
    displaced = max(abs(order[task_id] - place) for place, (task_id, _) in enumerate(claimed))
    last_id, last_priority = max(claimed, key=_due)
    row = connection.execute(
        _PASSED_OVER, {"agent": AGENT, "priority": last_priority, "task_id": last_id}
    ).fetchone()
    passed_over = row[0] if row else 0
    return displaced + passed_over, passed_over


def _due(row: Sequence[Any]) -> tuple[int, Any]:
    task_id, priority = row
    return -priority, task_id


_CLAIMED = """
    SELECT task_id, priority FROM tasks WHERE started_at > %s AND finished_at IS NOT NULL
    ORDER BY started_at
"""

_PASSED_OVER = """
    SELECT count(*) FROM tasks
    WHERE agent = %(agent)s AND state = 'queued'
      AND (priority > %(priority)s OR priority = %(priority)s AND task_id < %(task_id)s)
"""


def _lists(empty: Site, large: Site) -> list[list[str]]:
    rows = []
    for title, query in _LISTS.items():
        cells = [title]
        for site in (large, empty):
            wanted = request("GET", f"{site.url}/tasks?limit={PAGE}{query}")
            fire(wanted, 1, total=3)
            found = fire(wanted, 1, total=5)
            bad = [status for status in found.statuses if status != "200"]
            cells.append(f"answers {bad[0]}" if bad else f"{number(found.percentile_ms(50))} ms")
        rows.append(cells)
    return rows


def _broker_mib(site: Site, which: str = "used_memory") -> float:
    info: Any = site.broker().info("memory")
    return float(info[which]) / MIB


def _table(head: str, points: Sequence[_Point]) -> Table:
    rows = [
        [
            f"{point.size:,}",
            *(
                f"{Samples(costs.here, 'ms')}, {number(costs.ratio)} ×"
                for costs in point.costs.values()
            ),
        ]
        for point in points
    ]
    return Table((head, *COSTS), rows)


def _chart(name: str, title: str, x: str, points: Sequence[_Point]) -> Chart:
    sizes = [point.size for point in points]
    return Chart(
        name,
        title,
        x,
        "times the empty table's cost",
        [Curve(cost, sizes, [point.costs[cost].ratio for point in points]) for cost in COSTS],
    )
