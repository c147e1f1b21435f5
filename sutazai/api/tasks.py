"""`/tasks`: handing over a task without waiting, and reading, listing and cancelling tasks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from sutazai import callbacks, lifecycle, payload, record, statements
from sutazai.agent import Agent, normalise
from sutazai.api import store
from sutazai.api.acceptance import accept, answer_accepted, find, read_action, read_key
from sutazai.api.answer import json_answer
from sutazai.api.body import parse_query, read_object
from sutazai.api.front import Front, front_of
from sutazai.api.prefer import MAX_WAIT_S
from sutazai.api.signals import tell_ended
from sutazai.errors import Conflict, InvalidInput, TaskNotFound
from sutazai.lifecycle import Ended
from sutazai.state import State
from sutazai.submission import NO_OPTIONS, Instant, Options, Submission

if TYPE_CHECKING:
    from sqlalchemy import Row, TextClause
    from sqlalchemy.ext.asyncio import AsyncConnection

MAX_PAGE = 200

_FIELDS = ("action", "params", "options")


class Cursor(NamedTuple):
    """The last task of a page: when it was accepted, and its id."""

    created_at: datetime
    task_id: UUID

    def __str__(self) -> str:
        return f"{(self.created_at - _EPOCH) // timedelta(microseconds=1)}.{self.task_id}"

    @classmethod
    def read(cls, text: str | Cursor) -> Cursor:
        """Read what `str` has written; raises `ValueError`."""
        if isinstance(text, Cursor):
            return text
        found = re.fullmatch(r"([0-9]{1,17})\.([0-9a-f-]{36})", text)
        if not found:
            raise ValueError("It is no next_cursor of a page.")
        return cls(_EPOCH + timedelta(microseconds=int(found[1])), UUID(found[2]))


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class TasksQuery(BaseModel):
    """Which tasks to list."""

    model_config = ConfigDict(extra="forbid")

    state: list[State] = Field(default=[], description="Any of these; may be repeated.")
    action: str | None = Field(default=None, description="The name of the action.")
    label: list[Annotated[str, Field(pattern=r"^[^=]+=")]] = Field(
        default=[], description="`key=value`; may be repeated, and all must hold."
    )
    since: Instant | None = Field(default=None, description="Accepted at or after this.")
    until: Instant | None = Field(default=None, description="Accepted before this.")
    parent_id: UUID | None = Field(default=None, description="The children of this task.")
    agent: str | None = Field(default=None, description="Default: this front's; `*`: all.")
    limit: int = Field(default=50, ge=1, le=MAX_PAGE, description="Tasks on a page.")
    cursor: (
        Annotated[Cursor, PlainValidator(Cursor.read), WithJsonSchema({"type": "string"})] | None
    ) = Field(default=None, description="`next_cursor` of the page before.")


class WaitQuery(BaseModel):
    """Whether to wait for the end of a task."""

    model_config = ConfigDict(extra="forbid")

    wait: float = Field(
        default=0,
        ge=0,
        le=MAX_WAIT_S,
        allow_inf_nan=False,
        description="Seconds to wait for a terminal state.",
    )


async def create_task(request: Request) -> Response:
    """Accept a task and answer at once."""
    front = front_of(request)
    submission = read_submission(front.agent, await read_object(request), request)
    return await answer_accepted(front, submission, await accept(front, submission))


def read_submission(
    agent: Agent, body: dict[str, Any], request: Request | None = None, source: str = "api"
) -> Submission:
    """Return what a body of action, params and options asks for; raises `InvalidInput`."""
    if unknown := [name for name in body if name not in _FIELDS]:
        raise InvalidInput(
            f"{unknown[0]}: the body has the fields action, params and options only.",
            details=[{"field": name, "message": "It is not known here."} for name in unknown],
        )
    action = read_action(agent, body)
    params, options = read_member(body, "params"), read_member(body, "options")
    if request is not None:
        key = read_key(request, options.get("idempotency_key"), "options.idempotency_key")
        options |= {} if key is None else {"idempotency_key": key}
    chosen = NO_OPTIONS
    if options:
        chosen = payload.parse(Options, options, strict=True, prefix="options")
    return Submission(action, params, callbacks.checked(chosen), source)


def read_member(body: dict[str, Any], field: str) -> dict[str, Any]:
    """Return a field of a body that is an object, or {} where it is left out."""
    value = body.get(field, {})
    if isinstance(value, dict):
        return value
    raise InvalidInput(
        f"{field} must be a JSON object.",
        details=[{"field": field, "message": "It must be a JSON object."}],
    )


async def list_tasks(request: Request) -> Response:
    """List tasks, newest first."""
    query = parse_query(TasksQuery, request)
    rows = await _page(query, chosen_agent(front_of(request), query.agent))
    shown = rows[: query.limit]
    last = shown[-1] if len(rows) > len(shown) else None
    return json_answer(
        {
            "tasks": [record.task_json(row) for row in shown],
            "next_cursor": last and str(Cursor(last.created_at, last.task_id)),
        }
    )


def chosen_agent(front: Front, name: str | None) -> str | None:
    """Return whose are meant: this front's without a name, everybody's (None) for `*`."""
    if name == "*":
        return None
    chosen = front.agent.name if name is None else normalise(name)
    if chosen not in front.agents and chosen != front.agent.name:
        raise InvalidInput(
            f"agent: there is no agent {name!r}; there are: {', '.join(front.agents)}.",
            details=[{"field": "agent", "message": "There is no agent of this name."}],
        )
    return chosen


async def _page(query: TasksQuery, agent: str | None) -> Sequence[Row[Any]]:
    return await store.rows(page_of(query, agent))


def page_of(query: TasksQuery, agent: str | None) -> TextClause:
    """Return the statement that reads a page, and one task more: whether another page follows."""
    return statements.tasks_page(
        limit=query.limit + 1,
        agent=agent,
        action=query.action,
        states=query.state,
        labels=dict(label.split("=", 1) for label in query.label),
        since=query.since,
        until=query.until,
        parent_id=query.parent_id,
        before=query.cursor,
    )


async def show_task(request: Request) -> Response:
    """Return a task of any agent, at once or when it has ended."""
    wait_s = parse_query(WaitQuery, request).wait
    task_id = read_task_id(request)
    row = await find_or_refuse(task_id)
    if wait_s and not State(row.state).is_terminal:
        waiting = front_of(request).waiting
        with waiting.watch(task_id) as ended:
            await waiting.until(ended, wait_s)
        row = await find_or_refuse(task_id)
    return json_answer(record.task_json(row))


async def cancel_task(request: Request) -> Response:
    """Cancel a task: 200 when done, 202 while it is being carried out, 409 when it had ended."""
    cancelled = await _cancel(read_task_id(request))
    await tell_ended(front_of(request).waiting, cancelled.ended)
    state = State(cancelled.row.state)
    if state.is_terminal and not cancelled.ended:
        raise Conflict(f"The task has already ended: it is {state.value}.")
    return json_answer(record.task_json(cancelled.row), 200 if state.is_terminal else 202)


class _Cancelled(NamedTuple):
    row: Row[Any]
    ended: list[Ended]


async def _cancel(task_id: UUID) -> _Cancelled:
    async def change(connection: AsyncConnection) -> _Cancelled:
        ended = await connection.run_sync(lifecycle.cancel, task_id)
        row = (await connection.execute(statements.task(task_id))).first()
        if row is None:
            raise TaskNotFound
        return _Cancelled(row, ended)

    return await store.run(change)


async def find_or_refuse(task_id: UUID) -> Row[Any]:
    """Return a task's row; raises `TaskNotFound`."""
    row = await find(task_id)
    if row is None:
        raise TaskNotFound
    return row


def read_task_id(request: Request) -> UUID:
    """Return the id in the address; raises `TaskNotFound` when it is none."""
    text = request.path_params["task_id"]
    try:
        # UUID() also takes braces and urn: forms, which no link of ours has.
        if len(text) == 36:
            return UUID(text)
    except ValueError:
        pass
    raise TaskNotFound
