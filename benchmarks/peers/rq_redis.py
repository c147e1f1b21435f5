"""RQ, which forks a process a task."""

import time
from collections.abc import Sequence

import redis
from rq import Queue

from benchmarks.peers.address import BROKER
from benchmarks.peers.peer import WORKERS, Peer, command


def echo(number: int) -> int:
    """Return the number."""
    return number


class Measured(Peer):
    """A pool of workers on the default queue."""

    def __init__(self) -> None:
        self._queue = Queue(connection=redis.Redis.from_url(BROKER))

    def submit(self, count: int) -> None:
        for number in range(count):
            self._queue.enqueue(echo, number)

    def done(self) -> int:
        return int(self._queue.finished_job_registry.count)

    def trip(self) -> None:
        job = self._queue.enqueue(echo, 1)
        while job.get_status(refresh=True) != "finished":
            time.sleep(0.002)

    def commands(self) -> Sequence[Sequence[str]]:
        return [command("rq", "worker-pool", "-n", str(WORKERS), "-u", BROKER, "-q")]
