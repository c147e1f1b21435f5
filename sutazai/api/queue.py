"""`/queue`: how an agent's queue stands, and pausing, draining and resuming it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from sutazai import lifecycle, record, statements
from sutazai.api import store
from sutazai.api.answer import json_answer
from sutazai.api.front import front_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


async def show_queue(request: Request) -> Response:
    """Return how the queue stands."""
    return await _answer(request)


async def pause_queue(request: Request) -> Response:
    """Start no more tasks until resumed; new ones are accepted and wait."""
    return await _answer(request, paused=True)


async def drain_queue(request: Request) -> Response:
    """Accept no new tasks until resumed; those that are there are done."""
    return await _answer(request, draining=True)


async def resume_queue(request: Request) -> Response:
    """Accept and start tasks again."""
    return await _answer(request, paused=False, draining=False)


async def _answer(request: Request, **change: Any) -> Response:
    agent = front_of(request).agent
    if change:

        async def work(connection: AsyncConnection) -> None:
            await connection.run_sync(lifecycle.set_queue, agent.name, **change)

        await store.run(work, again=True)
    [row] = await store.rows(statements.status([agent.name]))
    return json_answer(record.queue_json(row, agent.queue_limit))
