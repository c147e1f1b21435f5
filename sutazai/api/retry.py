"""Trying tasks again: each retry is a new task that names the old one as `retry_of`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from sutazai import payload, replay
from sutazai.api import store
from sutazai.api.acceptance import BATCH_WITHIN_S, accept, answer_accepted, read_key
from sutazai.api.answer import json_answer
from sutazai.api.body import read_json
from sutazai.api.front import front_of
from sutazai.api.tasks import read_task_id
from sutazai.errors import InvalidInput
from sutazai.replay import Filter
from sutazai.submission import Submission

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


class RetryBody(BaseModel):
    """What is to be different the second time."""

    model_config = ConfigDict(extra="forbid")

    params: dict[str, Any] | None = Field(
        default=None, description="All parameters anew; left out: those of the first time."
    )


async def retry_task(request: Request) -> Response:
    """Make a new task of one that has ended."""
    front = front_of(request)
    body = await _read(request, RetryBody)
    task_id, key = read_task_id(request), read_key(request, None, "")

    async def find(connection: AsyncConnection) -> Submission:
        return await connection.run_sync(
            replay.repeat_one, task_id, front.agents, params=body.params, idempotency_key=key
        )

    submission = await store.run(find, again=True)
    return await answer_accepted(front, submission, await accept(front, submission))


async def retry_tasks(request: Request) -> Response:
    """Make new tasks of failed ones, so many a second; those retried before are left out."""
    front = front_of(request)
    wanted = await _read(request, Filter)

    async def change(connection: AsyncConnection) -> list[str]:
        ids = await connection.run_sync(
            replay.repeat_many, wanted, front.agents, default_agent=front.agent.name
        )
        return [str(task_id) for task_id in ids]

    ids = await store.run(change, within_s=BATCH_WITHIN_S)
    return json_answer({"status": "accepted", "task_ids": ids}, 202)


async def _read(request: Request, model: Any) -> Any:
    """Return the body, which may be left out."""
    length = request.headers.get("content-length", "")
    empty = "transfer-encoding" not in request.headers and (not length or length == "0")
    body = {} if empty else await read_json(request)
    if not isinstance(body, dict):
        raise InvalidInput("The body must be a JSON object, as {…}, or left out.")
    return payload.parse(model, body, strict=True)
