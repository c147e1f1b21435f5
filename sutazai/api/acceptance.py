"""Accepting a task: its row is committed before the answer, and the broker is never waited for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from sutazai import lifecycle, record, statements
from sutazai.api import store
from sutazai.api.answer import json_answer
from sutazai.api.front import Front
from sutazai.errors import InvalidInput
from sutazai.state import State
from sutazai.submission import Submission

if TYPE_CHECKING:
    from sqlalchemy import Row


async def accept(front: Front, submission: Submission) -> None:
    """Insert a task and ring; raises `DatabaseUnavailable`.

    The insert may be repeated: the same id is inserted once.
    """
    rung = lifecycle.will_ring(submission, front.bell)
    await store.rows(statements.accept(submission.row, rung=rung))
    if rung and front.bell is not None:
        front.bell.ring([submission.notice])


async def accepted(
    front: Front,
    submission: Submission,
    state: str = State.QUEUED,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the answer for a task that has not ended: where to find it."""
    task_id = str(submission.task_id)
    links = record.links(task_id)
    position: int | None = 0
    if state == State.QUEUED:
        position = await front.positions.estimate(
            submission.task_id, submission.action.agent, submission.options.priority
        )
    content = {
        "status": "accepted",
        "task_id": task_id,
        "state": state,
        "queue_position": position,
        "links": links,
    }
    return json_answer(content, 202, {"Location": links["self"], **(headers or {})})


async def find(task_id: UUID) -> Row[Any] | None:
    """Return a task's row; None when no task has this id."""
    return await store.first(statements.task(task_id))


def refuse_key(request: Request) -> None:
    """Refuse an idempotency key: to ignore it would promise what is not kept."""
    if "idempotency-key" in request.headers:
        raise InvalidInput(
            "Idempotency-Key is not supported yet; leave the header out.",
            details=[{"field": "Idempotency-Key", "message": "It is not supported yet."}],
        )
