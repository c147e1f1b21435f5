"""The queue checker, in the manner of Jepsen's: what was accepted must have ended, once."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tests.faults.load import Log
from tests.faults.place import AGENT, TICK_S, Place, until

END_WITHIN_S = 90.0
"""The lease of 30 s, the relay and the backlog fit well within it."""


@dataclass(frozen=True)
class Verdict:
    """What one run of a fault showed."""

    accepted: int
    lost: int
    """Accepted, and never ended."""

    doubled: int
    """Keys and ticks with two tasks, ticks before their time, and tasks whose effect is there more
    or less than once."""

    failed: int
    """Tasks that did not succeed although nothing was wrong with them."""

    unexplained: int
    """Answers 5xx without a task that are not the documented 503, and requests without any."""

    stale: int
    """Tasks that run with an expired lease at the end."""

    ticks: int
    """Tasks that Beat made meanwhile."""

    slowest_s: float
    """The slowest answer to a request."""

    @property
    def is_good(self) -> bool:
        """Whether every promise was kept."""
        wrong = (self.lost, self.doubled, self.failed, self.unexplained, self.stale)
        return self.accepted > 0 and self.ticks > 0 and not any(wrong)


def check(place: Place, log: Log, began_at: datetime) -> Verdict:
    """Wait until all that was accepted since an instant has ended, and judge."""
    ids = [task_id for found in log.accepted.values() for task_id in found]
    which = "FROM tasks WHERE task_id = ANY(%s::uuid[])"
    unfinished = f"SELECT count(*) {which} AND finished_at IS NULL"
    with contextlib.suppress(TimeoutError):  # what has not ended is what is lost
        until(lambda: place.value(unfinished, ids) == 0, END_WITHIN_S, "all tasks have ended")
    present = place.value(f"SELECT count(*) {which}", ids)
    lost = len(ids) - present + place.value(unfinished, ids)
    wrong = f"SELECT count(*) {which} AND finished_at IS NOT NULL AND state <> 'succeeded'"
    stale = "SELECT count(*) FROM tasks WHERE state = 'running' AND lease_expires_at < now()"
    return Verdict(
        accepted=len(log.accepted),
        lost=lost,
        doubled=_doubled(place, log, ids) + _doubled_ticks(place, began_at),
        failed=place.value(wrong, ids),
        unexplained=len(log.unexplained) + len(log.unanswered),
        stale=place.value(stale),
        ticks=place.value(f"SELECT count(*) {_TICKS}", began_at),
        slowest_s=log.slowest_s,
    )


_TICKS = f"FROM tasks WHERE scheduled_by = '{AGENT}.tick' AND created_at >= %s"


def _doubled_ticks(place: Place, began_at: datetime) -> int:
    """Count ticks with two tasks or with an early one, and tasks of ticks that ran twice."""
    period = f"round(extract(epoch FROM tick_at) / {TICK_S})"
    twice = (
        f"SELECT count(*) FROM (SELECT {period} {_TICKS} GROUP BY 1 HAVING count(*) > 1) AS twice"
    )
    early = f"SELECT count(*) {_TICKS} AND tick_at > created_at"
    effects = (
        f"SELECT count(*) {_TICKS} AND finished_at IS NOT NULL AND "
        "(SELECT count(*) FROM effects e WHERE e.task_id = tasks.task_id) "
        "<> CASE WHEN state = 'succeeded' THEN 1 ELSE 0 END"
    )
    return sum(int(place.value(query, began_at)) for query in (twice, early, effects))


def _doubled(place: Place, log: Log, ids: Collection[str]) -> int:
    keys = sum(len(found) != 1 for found in log.accepted.values())
    rows = place.value(
        "SELECT count(*) FROM (SELECT idempotency_key FROM tasks "
        "WHERE idempotency_key = ANY(%s) GROUP BY 1 HAVING count(*) <> 1) AS doubled",
        list(log.accepted),
    )
    # Each success of `work` has left exactly one row, and nothing else has left any.
    effects: Any = place.value(
        "SELECT count(*) FROM tasks t LEFT JOIN "
        "(SELECT task_id, count(*) AS n FROM effects GROUP BY 1) e USING (task_id) "
        "WHERE t.agent = 'target' AND t.action = 'work' AND t.finished_at IS NOT NULL "
        "AND (t.task_id = ANY(%s::uuid[]) OR t.parent_id = ANY(%s::uuid[])) "
        "AND coalesce(e.n, 0) <> CASE WHEN t.state = 'succeeded' THEN 1 ELSE 0 END",
        list(ids),
        list(ids),
    )
    return int(keys + rows + effects)
