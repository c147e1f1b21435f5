"""Estimates of how many tasks stand before a new one."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass
from uuid import UUID

from sutazai import statements
from sutazai.api import store
from sutazai.errors import DatabaseUnavailable

FRESH_S = 1.0


@dataclass
class _Count:
    at: float
    ahead: int


class Positions:
    """Counts at most once a second for each priority of a queue, and adds what came since."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, int], _Count] = {}
        self._locks: defaultdict[tuple[str, int], asyncio.Lock] = defaultdict(asyncio.Lock)

    async def estimate(self, task_id: UUID, agent: str, priority: int) -> int | None:
        """Return how many queued tasks stand before a new one; None above 10,000 or unknown."""
        key = (agent, priority)
        async with self._locks[key]:
            count = self._counts.get(key)
            if count is not None and time.monotonic() - count.at < FRESH_S:
                count.ahead += 1
            else:
                try:
                    ahead = await _count(task_id, agent, priority)
                except DatabaseUnavailable:
                    return None
                count = self._counts[key] = _Count(time.monotonic(), ahead)
        return count.ahead if count.ahead <= statements.DEPTH_LIMIT else None


async def _count(task_id: UUID, agent: str, priority: int) -> int:
    [row] = await store.rows(statements.queue_position(task_id, agent, priority))
    return int(row[0])
