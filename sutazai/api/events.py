"""`GET /tasks/{id}/events`: what happens to a task, as Server-Sent Events (WHATWG HTML, 9.2)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from uuid import UUID

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sutazai import record
from sutazai.api import store
from sutazai.api.front import front_of
from sutazai.api.tasks import read_task_id
from sutazai.api.waiting import Waiting
from sutazai.errors import DatabaseUnavailable, InvalidInput, TaskNotFound
from sutazai.record import EVENTS_PAGE, Event

POLL_S = 1.0
"""Between two looks while no signal comes."""

COMMENT_EACH_S = 15.0
"""Silence after which a comment is sent, so that nobody between takes the connection for dead."""

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_MOST = (1 << 63) - 1


async def stream_events(request: Request) -> Response:
    """Send the events of a task after `Last-Event-ID`, and end after the result.

    204 tells a client that reconnects after the result that nothing more will come.
    """
    after = _last_event_id(request)
    task_id = read_task_id(request)
    row = await store.first(record.follow(task_id, after))
    if row is None:
        raise TaskNotFound
    if row.finished_at is not None and not record.events(row, after):
        return Response(status_code=204)
    stream = _stream(front_of(request).waiting, task_id, after)
    return StreamingResponse(stream, media_type="text/event-stream", headers=_HEADERS)


def _last_event_id(request: Request) -> int:
    text = request.headers.get("last-event-id", "0")
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= _MOST):
        raise InvalidInput(
            "The header Last-Event-ID must be the id of an event of this stream.",
            details=[{"field": "Last-Event-ID", "message": "It is not an id of an event."}],
        )
    return int(text)


async def _stream(waiting: Waiting, task_id: UUID, after: int) -> AsyncIterator[bytes]:
    sent_at = time.monotonic()
    with waiting.follow(task_id) as news:
        while not waiting.closed:
            news.clear()
            try:
                events = await _read(task_id, after)
            except DatabaseUnavailable:
                events = []  # the connection is kept: the task goes on
            for event in events:
                after = event.event_id
                sent_at = time.monotonic()
                yield _format(event)
                if event.kind == "result":
                    return
            if len(events) >= EVENTS_PAGE:
                continue
            if time.monotonic() - sent_at >= COMMENT_EACH_S:
                sent_at = time.monotonic()
                yield b": the task goes on\n\n"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await news.wait()


async def _read(task_id: UUID, after: int) -> list[Event]:
    """Return the next events in order."""
    row = await store.first(record.follow(task_id, after))
    if row is None:
        return []
    return record.events(row, after)


def _format(event: Event) -> bytes:
    data = orjson.dumps(event.data, option=orjson.OPT_UTC_Z, default=str)
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.event_id, event.kind.encode(), data)
