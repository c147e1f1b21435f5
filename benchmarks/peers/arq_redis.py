"""arq, which keeps its results in its one Redis database.

It needs a redis-py older than the one that the product needs, so it is rarely installed beside it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import redis
from arq import create_pool
from arq.connections import RedisSettings

from benchmarks.peers.address import BROKER
from benchmarks.peers.looped import LoopedPeer
from benchmarks.peers.peer import WORKERS, command

_REDIS = RedisSettings.from_dsn(BROKER)


async def echo(context: dict[str, Any], number: int) -> int:
    """Return the number."""
    return number


class WorkerSettings:
    """What arq's command reads."""

    functions: ClassVar[list[Any]] = [echo]
    max_jobs = 10
    poll_delay = 0.01
    redis_settings = _REDIS


class Measured(LoopedPeer):
    """This application, with ten jobs at once a process."""

    def __init__(self) -> None:
        super().__init__()
        self._redis: Any = redis.Redis.from_url(BROKER)
        self._pool: Any = self.run(create_pool(_REDIS))

    async def send(self, number: int) -> Any:
        return await self._pool.enqueue_job("echo", number)

    async def receive(self, sent: Any) -> None:
        await sent.result(timeout=20, poll_delay=0.002)

    def done(self) -> int:
        return sum(1 for _ in self._redis.scan_iter("arq:result:*", 5000))

    def commands(self) -> Sequence[Sequence[str]]:
        return [command("arq", f"{__name__}.WorkerSettings")] * WORKERS
