"""`POST /tasks/batch`: many tasks in one request, all or none."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sutazai import payload
from sutazai.agent import Agent
from sutazai.api.acceptance import accept_many
from sutazai.api.answer import json_answer
from sutazai.api.body import MAX_BODY_BYTES, read_json
from sutazai.api.front import front_of
from sutazai.api.tasks import read_submission
from sutazai.errors import InvalidInput, PayloadTooLarge
from sutazai.submission import Submission

MAX_ITEMS = 10_000
MAX_BATCH_BYTES = 32 << 20


async def create_tasks(request: Request) -> Response:
    """Accept an array of tasks and answer with their ids, in order."""
    front = front_of(request)
    if "idempotency-key" in request.headers:
        raise InvalidInput(
            "A batch takes no Idempotency-Key; give each item's options.idempotency_key.",
            details=[{"field": "Idempotency-Key", "message": "It is not known here."}],
        )
    items = await read_json(request, MAX_BATCH_BYTES)
    if not isinstance(items, list):
        raise InvalidInput("The body must be a JSON array of tasks, as [{…}, …].")
    check_number(len(items))
    # On a thread: other clients must not wait until ten thousand tasks are validated.
    submissions = await asyncio.to_thread(_read_all, front.agent, items)
    ids = await accept_many(front, submissions)
    content = {"status": "accepted", "task_ids": [str(task_id) for task_id in ids]}
    return json_answer(content, 202)


def check_number(items: int) -> None:
    """Raise `InvalidInput` when a batch has no tasks, or too many."""
    if not 1 <= items <= MAX_ITEMS:
        raise InvalidInput(f"A batch has 1 to {MAX_ITEMS} tasks; this one has {items}.")


def _read_all(agent: Agent, items: list[Any]) -> list[Submission]:
    return [read_item(agent, item, f"Item {index}") for index, item in enumerate(items)]


def read_item(agent: Agent, item: Any, place: str, source: str = "api") -> Submission:
    """Return one task of a batch; errors name its place. Raises as `read_submission` does."""
    if not isinstance(item, dict):
        raise InvalidInput(f"{place}: it must be a JSON object.")
    if len(payload.dumps(item)) > MAX_BODY_BYTES:
        raise PayloadTooLarge(f"{place} is larger than {MAX_BODY_BYTES} bytes.")
    try:
        return read_submission(agent, item, source=source)
    except InvalidInput as error:
        error.args = (f"{place}: {error}",)
        raise
