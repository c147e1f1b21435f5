"""Accepting a task: its row is committed before the answer, and the broker is never waited for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from sutazai import admission, record, statements
from sutazai.admission import Accepted
from sutazai.agent import Action, Agent
from sutazai.api import signals, store
from sutazai.api.answer import json_answer
from sutazai.api.front import Front
from sutazai.errors import InvalidInput
from sutazai.state import State
from sutazai.submission import Submission

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

STATE_WITHIN_S = 0.4
"""Beside accepting, so that an answer about PostgreSQL's absence comes within 3 s."""

BATCH_WITHIN_S = 30.0
"""For as many tasks as one request may hand over."""


async def accept(front: Front, submission: Submission) -> Accepted:
    """Insert a task and ring, or find the one that it repeats; raises as `admission.accept` does.

    It may be repeated: the same id is inserted once.
    """
    rung = admission.will_ring(submission, front.bell)
    limit = front.agents.get(submission.action.agent, front.agent).queue_limit
    options = submission.options
    plain = options.idempotency_key is None and not options.resolves_conflict and limit is None
    # Most tasks: one statement, so one round trip. When it inserts nothing there is a reason.
    if plain and await front.group.insert(submission, rung=rung):
        accepted = Accepted(submission.task_id, fresh=True)
    else:

        async def admit(connection: AsyncConnection) -> Accepted:
            return await connection.run_sync(admission.accept, submission, rung=rung, limit=limit)

        accepted = await store.run(admit, again=True)
    if accepted.fresh and rung and front.bell is not None:
        front.bell.ring([submission.notice])
    await signals.tell_ended(front.waiting, accepted.replaced)
    return accepted


async def accept_many(front: Front, submissions: list[Submission]) -> list[UUID]:
    """Insert many tasks, all or none; the relay rings them. Raises as `admission.accept` does."""

    async def admit(connection: AsyncConnection) -> list[UUID]:
        return await connection.run_sync(
            admission.accept_many, submissions, limit=front.agent.queue_limit
        )

    return await store.run(admit, within_s=BATCH_WITHIN_S)


async def answer_accepted(
    front: Front,
    submission: Submission,
    accepted: Accepted,
    state: State | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the answer for a task that has not ended: where to find it."""
    task_id = str(accepted.task_id)
    links = record.links(task_id)
    if state is None and not accepted.fresh:
        row = await store.first(statements.result(accepted.task_id), within_s=STATE_WITHIN_S)
        state = State(row.state) if row else None
    state = state or State.QUEUED
    position: int | None = 0
    if state is State.QUEUED:
        position = await front.positions.estimate(
            accepted.task_id, submission.action.agent, submission.options.priority
        )
    content = {
        "status": "accepted",
        "task_id": task_id,
        "state": state,
        "queue_position": position,
        "links": links,
    }
    more = {**replayed(accepted), **(headers or {})}
    return json_answer(content, 202, {"Location": links["self"], **more})


def replayed(accepted: Accepted) -> dict[str, str]:
    """Return the header that tells a repeated request from the first one."""
    return {"Idempotent-Replayed": "true"} if accepted.replayed else {}


async def find(task_id: UUID) -> Row[Any] | None:
    """Return a task's row; None when no task has this id."""
    return await store.first(statements.task(task_id))


def read_action(agent: Agent, body: dict[str, Any]) -> Action[Any, Any]:
    """Return the action that a body names; raises `InvalidInput` and `UnknownAction`."""
    name = body.get("action")
    if not isinstance(name, str):
        known = ", ".join(sorted(agent.actions))
        problem = "It must be a string." if "action" in body else "It is required."
        raise InvalidInput(
            f"Name the action in the field action; one of: {known}.",
            details=[{"field": "action", "message": problem}],
        )
    return agent.get(name)


def read_key(request: Request, alias: Any, field: str) -> Any:
    """Return the idempotency key of a request: its header, or its alias in the body.

    Raises `InvalidInput` when both are given and differ; the form is checked by `Options`.
    """
    header = request.headers.get("idempotency-key")
    if header is not None and alias is not None and header != alias:
        raise InvalidInput(
            f"The header Idempotency-Key and {field} differ; give one of them.",
            details=[{"field": field, "message": "It differs from the header Idempotency-Key."}],
        )
    return alias if header is None else header
