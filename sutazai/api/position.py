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

WITHIN_S = 0.3
"""The task is accepted by then: an estimate is not worth more waiting."""


@dataclass
class _Count:
    at: float
    ahead: int | None
    """None: PostgreSQL did not say, and is not asked again while this is fresh."""


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
            if count is None or time.monotonic() - count.at >= FRESH_S:
                ahead = await _count(task_id, agent, priority)
                count = self._counts[key] = _Count(time.monotonic(), ahead)
            elif count.ahead is not None:
                count.ahead += 1
        known = count.ahead
        return known if known is not None and known <= statements.DEPTH_LIMIT else None


async def _count(task_id: UUID, agent: str, priority: int) -> int | None:
    position = statements.queue_position(task_id, agent, priority)
    try:
        [row] = await store.rows(position, within_s=WITHIN_S)
    except DatabaseUnavailable:
        return None
    ahead: int = row[0]
    return ahead
