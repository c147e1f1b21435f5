"""Waiting for tasks to end: one subscription and one query for all the clients of a process.

Workers publish on Redis when a task has ended; that is only speed. Correctness is one query for
all waited tasks, every second while signals come and every tenth of one while they do not. Nobody
waits: nothing runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from uuid import UUID

import orjson
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from sutazai import log, redis, statements
from sutazai.api import store
from sutazai.errors import SutazaiError

POLL_S = 1.0
"""Between two queries while Redis signals."""

POLL_ALONE_S = 0.1
"""Between two queries while it does not."""

LINGER_S = 30.0
"""The subscription outlives the last waiting client for this long: the next one soon comes."""

SILENCE_S = 1.0
"""After it Redis is asked whether it still answers; no answer within the same time: it is away."""

MAX_PAUSE_S = 5.0

CHUNK = 2000

_logger = log.get(__name__)


class Waiting:
    """Wakes requests when their tasks end; one for all the fronts of a process."""

    def __init__(self) -> None:
        self._waiters: dict[UUID, set[asyncio.Future[None]]] = {}
        self._followers: dict[UUID, set[asyncio.Event]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._listener: asyncio.Task[None] | None = None
        self._signalled = False
        self._poll_now = asyncio.Event()
        self._idle_since = 0.0
        self._closed = False

    @property
    def count(self) -> int:
        """How many requests wait now."""
        return sum(map(len, self._waiters.values()))

    @contextmanager
    def watch(self, task_id: UUID) -> Iterator[asyncio.Future[None]]:
        """Give a future that is done when the task has ended.

        Begin before the task is committed, so that no signal is missed.
        """
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(task_id, set()).add(ended)
        self._start()
        try:
            yield ended
        finally:
            waiters = self._waiters.get(task_id)
            if waiters is not None:
                waiters.discard(ended)
                if not waiters:
                    del self._waiters[task_id]
            self._idle_since = time.monotonic()

    @contextmanager
    def follow(self, task_id: UUID) -> Iterator[asyncio.Event]:
        """Give an event that is set whenever a signal of the task comes; signals may be lost."""
        news = asyncio.Event()
        self._followers.setdefault(task_id, set()).add(news)
        self._start()
        try:
            yield news
        finally:
            followers = self._followers[task_id]
            followers.discard(news)
            if not followers:
                del self._followers[task_id]
            self._idle_since = time.monotonic()

    @property
    def closed(self) -> bool:
        """Whether the process stops."""
        return self._closed

    async def until(self, ended: asyncio.Future[None], timeout_s: float) -> None:
        """Wait until the future is done, the time is over, or the process stops."""
        if self._closed:
            return
        # Less than a time-out of asyncio's: there may be ten thousand of them.
        timer = asyncio.get_running_loop().call_later(timeout_s, _let_go, ended)
        try:
            await ended
        finally:
            timer.cancel()

    def wake(self, task_id: UUID) -> None:
        """Let those who wait for a task go on."""
        for ended in self._waiters.get(task_id, ()):
            _let_go(ended)
        self._tell(task_id)

    def _tell(self, task_id: UUID) -> None:
        for news in self._followers.get(task_id, ()):
            news.set()

    def release(self) -> None:
        """Let everybody go on: the process stops."""
        self._closed = True
        for task_id in [*self._waiters, *self._followers]:
            self.wake(task_id)

    async def close(self) -> None:
        """Release everybody and end what runs in the background."""
        self.release()
        running = [task for task in (self._poller, self._listener) if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _start(self) -> None:
        if self._closed:
            return
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        if self._listener is None or self._listener.done():
            self._listener = asyncio.create_task(self._listen())

    # --- polling ----------------------------------------------------------------------------

    async def _poll(self) -> None:
        while self._waiters:
            self._poll_now.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S if self._signalled else POLL_ALONE_S):
                    await self._poll_now.wait()
            try:
                await self._wake_ended()
            except SutazaiError as error:
                _logger.debug("waiting for PostgreSQL", reason=str(error))
                await asyncio.sleep(POLL_S)

    async def _wake_ended(self) -> None:
        waited = [task_id for task_id, waiters in self._waiters.items() if not _done(waiters)]
        for start in range(0, len(waited), CHUNK):
            for row in await store.rows(statements.ended(waited[start : start + CHUNK])):
                # A signal should have come first: until the next one, polling is relied upon.
                self._signalled = self._signalled and _done(self._waiters.get(row.task_id, ()))
                self.wake(row.task_id)

    # --- signals ----------------------------------------------------------------------------

    async def _listen(self) -> None:
        pause_s = POLL_ALONE_S
        while self._is_wanted():
            try:
                async with _subscription() as signals:
                    if signals is None:
                        return
                    pause_s = POLL_ALONE_S
                    # What ended before the subscription held has sent its signal in vain.
                    self._signalled = True
                    self._poll_now.set()
                    await self._follow(signals)
            except (RedisError, OSError, TimeoutError) as error:
                _logger.debug("no signals from redis", error=str(error))
            finally:
                self._signalled = False
            await asyncio.sleep(pause_s)
            pause_s = min(MAX_PAUSE_S, 2 * pause_s)

    async def _follow(self, signals: PubSub) -> None:
        asked = False
        while self._is_wanted():
            message = await signals.get_message(timeout=SILENCE_S)
            if message is not None:
                asked = False
                self._take(message)
            elif asked:
                raise TimeoutError("redis has fallen silent")
            else:
                asked = True
                await signals.ping()

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] != "pmessage":
            return
        ended = '"kind":"state"' in message["data"]
        self._signalled = self._signalled or ended
        if ended or self._followers:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                task_id = UUID(orjson.loads(message["data"])["task_id"])
                self.wake(task_id) if ended else self._tell(task_id)

    def _is_wanted(self) -> bool:
        idle_s = time.monotonic() - self._idle_since
        return not self._closed and (
            bool(self._waiters) or bool(self._followers) or idle_s < LINGER_S
        )


@asynccontextmanager
async def _subscription() -> AsyncIterator[PubSub | None]:
    """Subscribe to the events of every agent; None where no Redis is configured."""
    client = redis.asynchronous()
    if client is None:
        yield None
        return
    async with client, client.pubsub() as signals:
        async with asyncio.timeout(2 * SILENCE_S):
            await signals.psubscribe(redis.events_channel("*"))
            while (await signals.get_message(timeout=SILENCE_S)) is None:
                pass
        yield signals


def _let_go(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


def _done(waiters: Any) -> bool:
    return all(ended.done() for ended in waiters)
