"""Taskiq on Redis streams, with results in Redis."""

from collections.abc import Sequence
from typing import Any

import redis
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from benchmarks.peers.address import BROKER, RESULTS
from benchmarks.peers.looped import LoopedPeer
from benchmarks.peers.peer import WORKERS, command

_results: Any = RedisAsyncResultBackend(redis_url=RESULTS)
broker = RedisStreamBroker(url=BROKER).with_result_backend(_results)


@broker.task
async def echo(number: int) -> int:
    """Return the number."""
    return number


class Measured(LoopedPeer):
    """This application."""

    def __init__(self) -> None:
        super().__init__()
        self._redis: Any = redis.Redis.from_url(RESULTS)
        self.run(broker.startup())

    async def send(self, number: int) -> Any:
        return await echo.kiq(number)

    async def receive(self, sent: Any) -> None:
        await sent.wait_result(check_interval=0.002, timeout=20)

    def done(self) -> int:
        return int(self._redis.dbsize())

    def commands(self) -> Sequence[Sequence[str]]:
        worker = ("worker", f"{__name__}:broker", "--workers", str(WORKERS))
        return [command("taskiq", *worker, "--log-level", "ERROR")]
