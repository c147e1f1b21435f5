"""Beat on PostgreSQL: schedules are rows, and a tick is accepted at most once.

Any number of Beats may run: ticks lie on multiples of the period, are taken by one UPDATE, and the
tasks they make are unique by (schedule, tick, host). Beat keeps no file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

from celery import Celery
from celery.beat import Scheduler

from sutazai import admission, db, log, statements
from sutazai.agent import Action
from sutazai.bell import Bell
from sutazai.errors import DatabaseUnavailable, InvalidInput, UnknownAgent
from sutazai.settings import settings
from sutazai.submission import Options, Submission
from sutazai.tasks import load

if TYPE_CHECKING:
    from sqlalchemy import Row


AFTER_OUTAGE_S = 1.0

_logger = log.get(__name__)


class PostgresScheduler(Scheduler):  # type: ignore[misc]
    """Celery's scheduler, reading and writing rows; `celery -A sutazai beat` uses it."""

    app: Celery

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._instance = f"{settings().host}:{uuid4()}"
        self._declared = False
        super().__init__(*args, **kwargs)

    def setup_schedule(self) -> None:
        """Start with no entries of Celery's own."""

    def tick(self, **_: Any) -> float:
        """Accept what is due; return in how many seconds to look again."""
        try:
            if not self._declared:
                declare()
                self._declared = True
            with db.transaction() as connection:
                connection.execute(statements.serve("beat", self._instance))
                due = connection.execute(statements.tick_schedules()).all()
                accepted = [
                    submission
                    for row in due
                    for submission in submissions(row, _hosts(connection, row))
                    if admission.accept(connection, submission, rung=True).fresh
                ]
                next_s = connection.execute(statements.next_tick()).scalar()
        except DatabaseUnavailable as error:
            _logger.warning("waiting for PostgreSQL", reason=str(error))
            return AFTER_OUTAGE_S
        bell: Bell = self.app.bell()
        bell.ring([submission.notice for submission in accepted])
        for submission in accepted:
            _logger.info(
                "scheduled", task=submission.action.full_name, task_id=str(submission.task_id)
            )
        return min(float(self.max_interval), max(0.01, float(next_s or self.max_interval)))

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


def declare() -> None:
    """Write the schedules of all declared actions; those no longer declared are removed."""
    rows = [_row(action) for agent in load().agents.values() for action in agent.actions.values()]
    wanted = [row for row in rows if row]
    with db.transaction() as connection:
        for row in wanted:
            connection.execute(statements.declare_schedule(row))
        connection.execute(statements.forget_schedules([row["name"] for row in wanted]))


def submissions(row: Row[Any], hosts: list[str | None]) -> list[Submission]:
    """Return the tasks of one tick; each is of no use any more when the next one comes."""
    try:
        action = load().get(row.agent).get(row.action)
        options = Options(deadline_at=row.next_tick_at)
        return [
            Submission(
                action,
                row.params,
                options,
                "beat",
                scheduled_by=row.name,
                tick_at=row.tick_at,
                host=host,
            )
            for host in hosts
        ]
    except (UnknownAgent, InvalidInput) as error:
        _logger.error("a schedule cannot run", schedule=row.name, reason=str(error))
        return []


def _hosts(connection: Any, row: Row[Any]) -> list[str | None]:
    if not row.each_host:
        return [None]
    return list(connection.execute(statements.live_hosts(row.agent)).scalars())


def _row(action: Action[Any, Any]) -> dict[str, Any] | None:
    if action.every is None:
        return None
    return {
        "name": action.full_name,
        "agent": action.agent,
        "action": action.name,
        "params": {},
        "every_s": action.every.total_seconds(),
        "each_host": action.on == "each-host",
    }
