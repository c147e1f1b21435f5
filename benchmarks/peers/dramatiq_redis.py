"""Dramatiq with its Redis broker and results in Redis."""

from collections.abc import Sequence
from typing import Any

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks.peers.address import BROKER, RESULTS
from benchmarks.peers.peer import WORKERS, Peer, command

broker = RedisBroker(url=BROKER)
broker.add_middleware(Results(backend=RedisBackend(url=RESULTS), store_results=True))
dramatiq.set_broker(broker)


@dramatiq.actor
def echo(number: int) -> int:
    """Return the number."""
    return number


class Measured(Peer):
    """This application, with four threads a process."""

    def __init__(self) -> None:
        self._redis: Any = redis.Redis.from_url(RESULTS)

    def submit(self, count: int) -> None:
        for number in range(count):
            echo.send(number)

    def done(self) -> int:
        return int(self._redis.dbsize())

    def trip(self) -> None:
        echo.send(1).get_result(block=True, timeout=20_000)

    def commands(self) -> Sequence[Sequence[str]]:
        return [command("dramatiq", __name__, "--processes", str(WORKERS), "--threads", "4")]
