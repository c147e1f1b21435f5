"""Huey with its Redis storage, which keeps the results too."""

from collections.abc import Sequence
from typing import Any

import redis
from huey import RedisHuey

from benchmarks.peers.address import BROKER
from benchmarks.peers.peer import WORKERS, Peer, command

huey = RedisHuey("bench", url=BROKER)


@huey.task()
def echo(number: int) -> int:
    """Return the next number: Huey keeps no result that is None, and 0 is none to some."""
    return number + 1


class Measured(Peer):
    """This application."""

    def __init__(self) -> None:
        self._redis: Any = redis.Redis.from_url(BROKER)

    def submit(self, count: int) -> None:
        for number in range(count):
            echo(number)

    def done(self) -> int:
        return int(self._redis.hlen("huey.results.bench"))

    def trip(self) -> None:
        echo(1)(blocking=True, backoff=1, max_delay=0.005, timeout=20)

    def commands(self) -> Sequence[Sequence[str]]:
        workers = ("--worker-type", "process", "--workers", str(WORKERS), "--quiet")
        return [command("huey_consumer", f"{__name__}.huey", *workers)]
