"""The latest hardware sample, which the sampling agent's front shows."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from redis.exceptions import RedisError

from sutazai import redis
from sutazai.api.cached import Cached
from sutazai.errors import Unavailable

SAMPLER = "hardware-resource-optimizer"
"""The agent whose front shows samples."""

KEY, FIELD = "system:metrics", "current"

FRESH_S = 1.0


class Sample:
    """Reads the latest sample from Redis, at most once a second."""

    def __init__(self) -> None:
        self._latest = Cached(_read, fresh_s=FRESH_S, within_s=1.0, late=None)

    async def latest(self) -> dict[str, Any] | None:
        """Return the latest sample; None when there is none or Redis is away."""
        return await self._latest.get()

    async def require(self) -> dict[str, Any]:
        """Return the latest sample; raises `Unavailable`."""
        sample = await self.latest()
        if sample is None:
            raise Unavailable("There is no hardware sample yet; try again shortly.")
        return sample


async def _read() -> dict[str, Any] | None:
    client = redis.asynchronous()
    if client is None:
        return None
    try:
        async with client, asyncio.timeout(1.0):
            text = await client.hget(KEY, FIELD)
        sample = orjson.loads(text) if text else None
    except (RedisError, OSError, TimeoutError, ValueError):
        return None
    return sample if isinstance(sample, dict) else None
