"""Beat on PostgreSQL: schedules are rows, and a tick is accepted at most once.

Any number of Beats may run: each takes the ticks of a schedule under a lock on its row, by the
database's clock, and the tasks they make are unique by (schedule, tick, host). Beat keeps no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from celery import Celery
from celery.beat import Scheduler
from celery.schedules import crontab
from celery.schedules import schedule as interval

from sutazai import db, log, payload, redis, schedule, statements
from sutazai.agent import Action
from sutazai.bell import Bell
from sutazai.errors import DatabaseUnavailable, InvalidInput, UnknownAgent
from sutazai.schedule import CELERYCONFIG, DECLARATION, NewSchedule
from sutazai.settings import settings
from sutazai.tasks import load
from sutazai.tick import Timing

AFTER_OUTAGE_S = 1.0

AFTER_FAILURE_S = 1.0

SHORTEST_SLEEP_S = 0.01

_logger = log.get(__name__)


class PostgresScheduler(Scheduler):  # type: ignore[misc]
    """Celery's scheduler, reading and writing rows; `celery -A sutazai beat` uses it."""

    app: Celery

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._instance = f"{settings().host}:{uuid4()}"
        self._declared = False
        self._failing: set[str] = set()
        super().__init__(*args, **kwargs)

    def setup_schedule(self) -> None:
        """Start with no entries of Celery's own."""

    def tick(self, **_: Any) -> float:
        """Accept what is due; return in how many seconds to look again."""
        agents = list(load().agents)
        try:
            if not self._declared:
                declare(self.app.conf)
                self._declared = True
            with db.transaction() as connection:
                connection.execute(statements.serve("beat", self._instance))
                due = connection.execute(statements.due_schedules(agents)).scalars().all()
            for name in due:
                self._try_to_take(name)
            with db.transaction() as connection:
                next_s = connection.execute(statements.next_tick(agents)).scalar()
        except DatabaseUnavailable as error:
            _logger.warning("waiting for PostgreSQL", reason=str(error))
            return AFTER_OUTAGE_S
        longest_s = float(self.max_interval)
        shortest_s = AFTER_FAILURE_S if self._failing.intersection(due) else SHORTEST_SLEEP_S
        return longest_s if next_s is None else min(longest_s, max(shortest_s, float(next_s)))

    def _try_to_take(self, name: str) -> None:
        """Take what is due of one schedule, which cannot stop the others: it is tried again."""
        try:
            self._take(name)
        except DatabaseUnavailable:
            raise
        except Exception:
            if name not in self._failing:
                _logger.exception("a schedule cannot be taken here", schedule=name)
            self._failing.add(name)
        else:
            self._failing.discard(name)

    def _take(self, name: str) -> None:
        """Take what is due of one schedule, in a transaction of its own."""
        with db.transaction() as connection:
            taken = schedule.take(connection, name, load().agents)
        if taken is None:
            return
        bell: Bell = self.app.bell()
        bell.ring([submission.notice for submission in taken.due])
        redis.announce_ended(taken.ended)
        for submission in taken.due:
            _logger.info(
                "scheduled", task=submission.action.full_name, task_id=str(submission.task_id)
            )

    def close(self) -> None:
        """Say goodbye."""
        try:
            with db.transaction() as connection:
                connection.execute(statements.retire("beat", self._instance))
        except DatabaseUnavailable as error:
            _logger.warning("left without a goodbye", reason=str(error))

    @property
    def info(self) -> str:
        """One line for Beat's banner."""
        return "    . schedules -> PostgreSQL"


def declare(conf: Any) -> None:
    """Write the schedules of all actions and of `beat_schedule`; others of theirs are removed.

    What is refused is logged, and the rest is written.
    """
    with db.transaction() as connection:
        now = connection.execute(statements.now()).scalar_one()
        rows = [*_declared(now), *_configured(conf, now)]
        kept: dict[str, list[str]] = {DECLARATION: [], CELERYCONFIG: []}
        for row in sorted(rows, key=lambda row: str(row["name"])):
            kept[row["source"]].append(row["name"])
            if connection.execute(statements.declare_schedule(row)).first() is None:
                _logger.error("the name of a schedule is taken", schedule=row["name"])
        # The schedules of an agent that cannot be imported today stay, paused or not.
        known = list(load().agents) if load().faults else None
        for source, names in kept.items():
            connection.execute(statements.forget_schedules(source, names, known))


def _declared(now: datetime) -> Iterator[dict[str, Any]]:
    for agent in load().agents.values():
        for action in agent.actions.values():
            if action.every is not None:
                yield _row(action, action.every.total_seconds(), now)


def _row(action: Action[Any, Any], every_s: float, now: datetime) -> dict[str, Any]:
    return {
        "name": action.full_name,
        "source": DECLARATION,
        "agent": action.agent,
        "action": action.name,
        "params": {},
        "every_s": every_s,
        "cron": None,
        "time_zone": "UTC",
        "each_host": action.on == "each-host",
        "overlap": "queue",
        "catch_up": 1,
        "expires": True,
        # At once, and not only when the first period is over.
        "next_tick_at": Timing(every_s).latest(now),
    }


def _configured(conf: Any, now: datetime) -> Iterator[dict[str, Any]]:
    for name, entry in (conf.beat_schedule or {}).items():
        try:
            yield configured(name, entry, str(conf.timezone or "UTC"), now)
        except (InvalidInput, UnknownAgent) as error:
            _logger.error("an entry of beat_schedule is refused", entry=name, why=str(error))


def configured(
    name: str, entry: Mapping[str, Any], time_zone: str, now: datetime
) -> dict[str, Any]:
    """Return the row of an entry of Celery's `beat_schedule`.

    Raises `InvalidInput` and `UnknownAgent` for what this system cannot do.
    """
    if entry.get("args"):
        raise InvalidInput("Actions take named parameters only; pass them as kwargs, not args.")
    options = dict(entry.get("options") or {})
    priority = options.pop("priority", None)
    if options:
        raise InvalidInput(f"Of the options only priority is taken, not {', '.join(options)}.")
    agent_name, _, action = str(entry.get("task")).rpartition(".")
    agent = load().get(agent_name)
    values = {
        "name": name,
        "action": action,
        "params": entry.get("kwargs") or {},
        **_times(entry.get("schedule"), time_zone),
    }
    new = payload.parse(
        NewSchedule, values if priority is None else values | {"priority": priority}
    )
    new.check(agent)
    row = {**new.values, "source": CELERYCONFIG, "agent": agent.name}
    del row["enabled"]
    return {**row, "next_tick_at": new.timing.after(now)}


def _times(when: Any, time_zone: str) -> dict[str, Any]:
    """Return period or cron expression of what Celery takes as a schedule."""
    if isinstance(when, crontab):
        return {"cron": _cron(when), "time_zone": time_zone}
    if isinstance(when, interval):
        when = when.run_every
    if isinstance(when, timedelta):
        when = when.total_seconds()
    if isinstance(when, int | float):
        return {"every_s": when}
    raise InvalidInput("The schedule must be seconds, a timedelta or a crontab.")


def _cron(when: crontab) -> str:
    """Return a crontab as five fields, with every value spelled out."""
    if len(when.day_of_week) < 7 and len(when.day_of_month) < 31:
        raise InvalidInput(
            "Celery means both day_of_month and day_of_week, cron means either; give one of them."
        )
    return " ".join(
        _field(values, size)
        for values, size in (
            (when.minute, 60),
            (when.hour, 24),
            (when.day_of_month, 31),
            (when.month_of_year, 12),
            (when.day_of_week, 7),
        )
    )


def _field(values: Iterable[int], size: int) -> str:
    chosen = sorted(values)
    return "*" if len(chosen) == size else ",".join(map(str, chosen))
