"""Schedules: rows that say when an action runs by itself, and the taking of their ticks.

The verbs are plain functions of a connection, each within one transaction; fronts run them through
`AsyncConnection.run_sync`. tick.py knows when a schedule is due.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from sutazai import admission, lifecycle, log, payload, statements
from sutazai.agent import Agent, normalise
from sutazai.errors import Conflict, InvalidInput, QueueDraining, ScheduleNotFound, UnknownAgent
from sutazai.submission import DEFAULT_PRIORITY, Options, Submission
from sutazai.tick import Tick, Timing, jitter

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row

NAME = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,199}$"
"""Names stand in addresses."""

MAX_CATCH_UP = 1000

DECLARATION, CELERYCONFIG, USER = "declaration", "celeryconfig", "user"

_CATCH_UP = {"none": 0, "last": 1}

_FIELDS = (
    *("name", "source", "agent", "action", "params", "priority", "every_s", "cron", "time_zone"),
    *("enabled", "overlap", "jitter_s", "expires", "last_tick_at", "next_tick_at"),
    *("missed", "skipped"),
)

_logger = log.get(__name__)


class Definition(BaseModel):
    """What is to run, and when."""

    model_config = ConfigDict(extra="forbid")

    action: str = Field(description="The name of the action.")
    params: dict[str, Any] = Field(default_factory=dict, description="The action's parameters.")
    every_s: float | None = Field(
        default=None,
        ge=1,
        le=366 * 86_400,
        allow_inf_nan=False,
        description="Period in seconds; ticks lie on its multiples since 1970. Or cron.",
    )
    cron: str | None = Field(
        default=None,
        max_length=200,
        description="Minute, hour, day of month, month, day of week. Or every_s.",
    )
    time_zone: str = Field(default="UTC", max_length=100, description="Of cron.")
    on: Literal["any-host", "each-host"] = Field(
        default="any-host", description="One task a tick, or one on each live host."
    )
    overlap: Literal["skip", "queue", "replace"] = Field(
        default="skip",
        description="While a task of an earlier tick has not ended: make none, make one all the "
        "same, or cancel that one.",
    )
    catch_up: Literal["none", "last"] | Annotated[int, Field(ge=1, le=MAX_CATCH_UP)] = Field(
        default="last",
        description="Of the ticks that passed while no Beat ran, take none, the last, or the last "
        "so many.",
    )
    jitter_s: float = Field(
        default=0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="Start up to so many seconds later, but before the next tick.",
    )
    expires: bool = Field(default=False, description="Still queued at the next tick, a task fails.")
    priority: int = Field(default=DEFAULT_PRIORITY, ge=0, le=9, description="9 is most urgent.")
    enabled: bool = Field(default=True, description="False: paused.")

    @property
    def timing(self) -> Timing:
        """When it ticks."""
        return Timing(self.every_s, self.cron, self.time_zone)

    @property
    def values(self) -> dict[str, Any]:
        """Its columns."""
        values = self.model_dump(exclude={"on", "catch_up"})
        values["each_host"] = self.on == "each-host"
        values["catch_up"] = _CATCH_UP.get(str(self.catch_up), self.catch_up)
        return values

    def check(self, agent: Agent) -> None:
        """Raise `InvalidInput` unless the agent has the action and would take the parameters."""
        agent.get(self.action).parse(self.params)
        self.timing.check()
        if self.expires and isinstance(self.catch_up, int) and self.catch_up > 1:
            message = "Tasks that expire at the next tick cannot be made up for; use last or none."
            fault = {"field": "catch_up", "message": message}
            raise InvalidInput(f"catch_up: {message}", details=[fault])


class NewSchedule(Definition):
    """A schedule to be added."""

    name: str = Field(pattern=NAME, description="Letters, digits and . _ : - only.")


class ScheduleChange(BaseModel):
    """What is to be different; the rest stays."""

    model_config = ConfigDict(extra="forbid")

    action: str | None = None
    params: dict[str, Any] | None = Field(default=None, description="All parameters anew.")
    every_s: float | None = Field(default=None, description="Takes the place of cron.")
    cron: str | None = Field(default=None, description="Takes the place of every_s.")
    time_zone: str | None = None
    on: Literal["any-host", "each-host"] | None = None
    overlap: Literal["skip", "queue", "replace"] | None = None
    catch_up: Literal["none", "last"] | int | None = None
    jitter_s: float | None = None
    expires: bool | None = None
    priority: int | None = None
    enabled: bool | None = Field(default=None, description="False pauses, true resumes.")


def add(connection: Connection, new: NewSchedule, agent: Agent) -> Row[Any]:
    """Add a schedule; its first tick is the next one. Raises `InvalidInput` and `Conflict`."""
    new.check(agent)
    now: datetime = connection.execute(statements.now()).scalar_one()
    row = {**new.values, "source": USER, "agent": agent.name}
    row["next_tick_at"] = new.timing.after(now)
    made = connection.execute(statements.add_schedule(row)).first()
    if made is None:
        raise Conflict(f"There is a schedule {new.name!r} already; choose another name.")
    return made


def change(
    connection: Connection, name: str, wanted: ScheduleChange, agents: Mapping[str, Agent]
) -> Row[Any]:
    """Change a schedule. One that is declared elsewhere can only be paused and resumed.

    Ticks that pass while it is paused are not missed. Raises `ScheduleNotFound`, `Conflict`,
    `InvalidInput`, and `UnknownAgent` when its agent is not declared any more.
    """
    row = find(connection, name, locked=True)
    given = wanted.model_dump(exclude_none=True)
    if any(field != "enabled" for field in given):
        _check_own(row)
    values = dict(given)
    timing = _timing(row)
    if values.keys() - {"enabled"}:
        definition = _merge(row, values)
        definition.check(_agent_of(row, agents))
        values, timing = definition.values, definition.timing
    resumed = bool(given.get("enabled")) and not row.enabled
    if resumed or timing != _timing(row):
        now: datetime = connection.execute(statements.now()).scalar_one()
        values["next_tick_at"] = timing.after(now)
    if not values:
        return row
    return connection.execute(statements.change_schedule(row.name, values)).one()


def remove(connection: Connection, name: str) -> None:
    """Remove a schedule; its tasks stay. Raises `ScheduleNotFound` and `Conflict`."""
    row = find(connection, name, locked=True)
    _check_own(row)
    connection.execute(statements.remove_schedule(row.name))


def find(connection: Connection, name: str, *, locked: bool = False) -> Row[Any]:
    """Return a schedule's row; raises `ScheduleNotFound`."""
    check_name(name)
    row = connection.execute(statements.schedule(name, locked=locked)).first()
    if row is None:
        raise ScheduleNotFound(f"There is no schedule {name!r}.")
    return row


def check_name(name: str) -> None:
    """Raise `ScheduleNotFound` for what cannot be the name of a schedule."""
    if not re.fullmatch(NAME, name):
        raise ScheduleNotFound(f"There is no schedule {name!r}.")


def run_once(
    row: Row[Any],
    agents: Mapping[str, Agent],
    *,
    source: str,
    idempotency_key: str | None = None,
) -> Submission:
    """Return the one task that a schedule makes beside its ticks, whatever its overlap says.

    Raises `InvalidInput` when the action no longer takes the parameters, and `UnknownAgent`.
    """
    options = {"priority": row.priority, "idempotency_key": idempotency_key}
    action = _agent_of(row, agents).get(row.action)
    chosen = payload.parse(Options, options)
    return Submission(action, row.params, chosen, source, scheduled_by=row.name)


def to_json(row: Row[Any]) -> dict[str, Any]:
    """Return a schedule as users see it; instants are text in UTC."""
    values = row._asdict()
    found: dict[str, Any] = {}
    for name in _FIELDS:
        value = values[name]
        if isinstance(value, datetime):
            value = value.astimezone(UTC).isoformat().replace("+00:00", "Z")
        found[name] = value
    found["on"] = "each-host" if row.each_host else "any-host"
    found["catch_up"] = {0: "none", 1: "last"}.get(row.catch_up, row.catch_up)
    return found


# --- ticks ----------------------------------------------------------------------------------


class Taken(NamedTuple):
    """What taking a schedule's ticks came to, for after the commit."""

    due: list[Submission]
    """Accepted, and to be rung now; the relay rings the others in their time."""

    ended: list[lifecycle.Ended]
    """What was cancelled in favour of a new one."""


def take(connection: Connection, name: str, agents: Mapping[str, Agent]) -> Taken | None:
    """Accept the tasks of a schedule's due ticks; None when another Beat has them.

    The lock on its row makes the ticks one Beat's; the unique (schedule, tick, host) of tasks would
    stop a second one all the same. A tick that is refused is missed.
    """
    row = connection.execute(statements.take_schedule(name)).first()
    if row is None:
        return None
    due = _timing(row).due(row.next_tick_at, row.now, row.catch_up)
    taken = Taken([], [])
    missed, skipped = due.missed, 0
    for tick in due.ticks:
        try:
            # What was cancelled comes back when the new task is refused.
            with connection.begin_nested():
                made = _take_tick(connection, row, tick, agents)
        except (QueueDraining, InvalidInput) as error:
            missed += 1
            _logger.warning("a tick is missed", schedule=name, reason=str(error))
            continue
        taken.due.extend(made.due)
        taken.ended.extend(made.ended)
        skipped += made.skipped
    connection.execute(
        statements.advance_schedule(
            name,
            last_tick_at=due.ticks[-1].at if due.ticks else None,
            next_tick_at=due.next_at,
            missed=missed,
            skipped=skipped,
        )
    )
    if missed:
        _logger.warning("ticks were missed", schedule=name, ticks=missed)
    return taken


class _TakenTick(NamedTuple):
    due: list[Submission]
    ended: list[lifecycle.Ended]
    skipped: int


def _take_tick(
    connection: Connection, row: Row[Any], tick: Tick, agents: Mapping[str, Agent]
) -> _TakenTick:
    action = agents[row.agent].get(row.action)
    run_at = tick.at + jitter(row.name, tick, row.jitter_s) if row.jitter_s else None
    options = Options(
        priority=row.priority,
        run_at=run_at,
        deadline_at=tick.next_at if row.expires else None,
    )
    is_due = run_at is None or run_at <= row.now
    due: list[Submission] = []
    ended: list[lifecycle.Ended] = []
    skipped = 0
    unfinished = _unfinished(connection, row)
    for host in _hosts(connection, row):
        before = [task.task_id for task in unfinished if host is None or task.host in (host, None)]
        if before and row.overlap == "skip":
            skipped += 1
            continue
        for task_id in before:
            ended += lifecycle.cancel(connection, task_id)
        submission = Submission(
            action,
            row.params,
            options,
            "beat",
            scheduled_by=row.name,
            tick_at=tick.at,
            host=host,
        )
        if admission.accept(connection, submission, rung=is_due).fresh and is_due:
            due.append(submission)
    return _TakenTick(due, ended, skipped)


def _unfinished(connection: Connection, row: Row[Any]) -> Sequence[Row[Any]]:
    if row.overlap == "queue":
        return ()
    return connection.execute(statements.unfinished_of_schedule(row.name)).all()


def _hosts(connection: Connection, row: Row[Any]) -> list[str | None]:
    if not row.each_host:
        return [None]
    return list(connection.execute(statements.live_hosts(row.agent)).scalars())


# --- parts ----------------------------------------------------------------------------------


def _timing(row: Row[Any]) -> Timing:
    return Timing(row.every_s, row.cron, row.time_zone)


def _merge(row: Row[Any], given: Mapping[str, Any]) -> Definition:
    """Return a schedule's definition with the changes; raises `InvalidInput`."""
    before = {
        name: value for name, value in to_json(row).items() if name in Definition.model_fields
    }
    if "cron" in given:
        before["every_s"] = None
    if "every_s" in given:
        before["cron"] = None
    return payload.parse(Definition, {**before, **given})


def _agent_of(row: Row[Any], agents: Mapping[str, Agent]) -> Agent:
    agent = agents.get(normalise(row.agent))
    if agent is None:
        raise UnknownAgent(f"There is no agent {row.agent!r} any more.")
    return agent


def _check_own(row: Row[Any]) -> None:
    """Refuse to change what would be as before at the next start of Beat."""
    if row.source == DECLARATION:
        raise Conflict(
            f"The schedule {row.name!r} is declared with `every=` at the action {row.action} of "
            f"{row.agent}; change it there. Here it can be paused, resumed and run."
        )
    if row.source == CELERYCONFIG:
        raise Conflict(
            f"The schedule {row.name!r} stands under `beat_schedule` in celeryconfig.py; change it "
            "there. Here it can be paused, resumed and run."
        )
