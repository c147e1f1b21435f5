"""The answer of a check, asked for anew when it is old, so that a busy monitor costs nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Cached(Generic[T]):
    """Keeps what a check said for `fresh_s`; one that takes longer than `within_s` says `late`.

    A check that is still under way is not begun again.
    """

    def __init__(
        self, check: Callable[[], Awaitable[T]], *, fresh_s: float, within_s: float, late: T
    ) -> None:
        self._check = check
        self._fresh_s = fresh_s
        self._within_s = within_s
        self._late = late
        self._value = late
        self._known_at = float("-inf")
        self._running: asyncio.Future[T] | None = None

    async def get(self) -> T:
        """Return the answer, at most `fresh_s` old."""
        if time.monotonic() - self._known_at < self._fresh_s:
            return self._value
        if self._running is None:
            self._running = asyncio.ensure_future(self._check())
        running = self._running
        done, _ = await asyncio.wait({running}, timeout=self._within_s)
        if done and self._running is running:
            self._running = None
        self._value = running.result() if done else self._late
        self._known_at = time.monotonic()
        return self._value
