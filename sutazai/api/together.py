"""Doing together what comes together: while one statement is under way, the next gathers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Together(Generic[T]):
    """Hands on what comes, several at once while others are being seen to.

    What comes alone waits for nothing.
    """

    def __init__(self, handle: Callable[[list[T]], Awaitable[None]], most: int) -> None:
        """Begin; handle: sees to several, raises nothing; most: how many it is given at once."""
        self._handle = handle
        self._most = most
        self._waiting: deque[T] = deque()
        self._task: asyncio.Task[None] | None = None

    def add(self, item: T) -> None:
        """Have one more seen to."""
        self._waiting.append(item)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    def drop(self) -> list[T]:
        """Take back all that has not been handed on."""
        dropped = list(self._waiting)
        self._waiting.clear()
        return dropped

    async def join(self) -> None:
        """Wait until nothing is left to do."""
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        while self._waiting:
            count = min(self._most, len(self._waiting))
            await self._handle([self._waiting.popleft() for _ in range(count)])
