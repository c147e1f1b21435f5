"""Telling those who wait, on this front and elsewhere, that tasks have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sutazai import redis
from sutazai.api.waiting import Waiting
from sutazai.lifecycle import Ended


async def tell_ended(waiting: Waiting, ended: Sequence[Ended]) -> None:
    """Wake this process's waiting clients, and announce it to the others."""
    for gone in ended:
        waiting.wake(gone.task_id)
    if ended:
        await asyncio.to_thread(redis.announce_ended, ended)
