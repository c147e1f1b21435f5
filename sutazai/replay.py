"""Replay: new tasks made of ended ones, one by one or in bulk."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from sutazai import admission, payload, statements
from sutazai.agent import Agent, normalise
from sutazai.errors import Conflict, InvalidInput, TaskNotFound, UnknownAgent
from sutazai.state import State
from sutazai.submission import Instant, Options, Submission

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row

MAX_TASKS = 10_000


class Filter(BaseModel):
    """Which failed or cancelled tasks are to be tried again, and how."""

    model_config = ConfigDict(extra="forbid")

    agent: str | None = Field(default=None, description="Whose; default: this front's.")
    action: str | None = Field(default=None, description="Only of this action.")
    state: Literal["failed", "cancelled"] = Field(default="failed", description="How they ended.")
    code: str | None = Field(default=None, description="Only with this error code.")
    since: Instant | None = Field(default=None, description="Ended at or after this.")
    until: Instant | None = Field(default=None, description="Ended before this.")
    labels: dict[str, str] = Field(default_factory=dict, description="With all these labels.")
    params: dict[str, Any] = Field(
        default_factory=dict, description="Parameters to replace; the others stay as they were."
    )
    rate_per_s: float = Field(
        default=10.0, ge=0.001, le=10_000, description="So many are started a second at most."
    )
    limit: int = Field(default=1000, ge=1, le=MAX_TASKS, description="So many at most.")


def repeat(
    row: Row[Any],
    agents: Mapping[str, Agent],
    *,
    params: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
    run_at: datetime | None = None,
) -> Submission:
    """Return the submission that does what an ended task should have done.

    It is for the same host, and has the same concurrency key and callback; its deadline and
    `on_conflict` are not those of the first one. Raises `InvalidInput` when the action no longer
    takes the parameters, and `UnknownAgent` when its agent is not declared any more.
    """
    agent = agents.get(row.agent)
    if agent is None:
        raise UnknownAgent(f"There is no agent {row.agent!r} any more.")
    options = payload.parse(
        Options,
        {
            "priority": row.priority,
            "max_attempts": row.max_attempts,
            "time_limit_s": row.time_limit_s,
            "labels": row.labels,
            "concurrency_key": row.concurrency_key,
            "callback_url": row.callback_url,
            "idempotency_key": idempotency_key,
            "run_at": run_at,
        },
    )
    return Submission(
        agent.get(row.action),
        row.params if params is None else params,
        options,
        "retry",
        retry_of=row.task_id,
        host=row.host,
    )


def repeat_one(
    connection: Connection,
    task_id: UUID,
    agents: Mapping[str, Agent],
    *,
    params: Mapping[str, Any] | None = None,
    edited: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Submission:
    """Return the submission that does what one task should have done, for the caller to accept.

    params: all parameters anew; edited: only these. Raises `TaskNotFound`, `Conflict` while the
    task has not ended, and as `repeat` does.
    """
    row = connection.execute(statements.task(task_id)).first()
    if row is None:
        raise TaskNotFound(f"There is no task {task_id}.")
    if not State(row.state).is_terminal:
        raise Conflict(f"The task has not ended yet: it is {row.state}.")
    changed = {**(row.params if params is None else params), **(edited or {})}
    return repeat(row, agents, params=changed, idempotency_key=idempotency_key)


def repeat_many(
    connection: Connection,
    wanted: Filter,
    agents: Mapping[str, Agent],
    *,
    default_agent: str | None = None,
) -> list[UUID]:
    """Make new tasks of those that a filter finds and that were not retried before, oldest first.

    All or none. Repeating the same call makes no second copies. Raises as `repeat` and
    `admission.accept` do.
    """
    name = normalise(wanted.agent) if wanted.agent else default_agent
    if name is None or name not in agents:
        raise UnknownAgent(f"There is no agent {name!r}; there are: {', '.join(agents)}.")
    connection.execute(statements.lock_replay(name))
    rows = connection.execute(
        statements.replayable(
            agent=name,
            state=wanted.state,
            action=wanted.action,
            code=wanted.code,
            since=wanted.since,
            until=wanted.until,
            labels=wanted.labels,
            limit=wanted.limit,
        )
    ).all()
    if not rows:
        return []
    now: datetime = connection.execute(statements.now()).scalar_one()
    submissions = []
    for index, row in enumerate(rows):
        run_at = now + timedelta(seconds=index / wanted.rate_per_s) if index else None
        try:
            submission = repeat(row, agents, params={**row.params, **wanted.params}, run_at=run_at)
        except InvalidInput as error:
            raise InvalidInput(f"Task {row.task_id}: {error}", details=error.details) from None
        submissions.append(submission)
    return admission.accept_many(connection, submissions, limit=agents[name].queue_limit)
