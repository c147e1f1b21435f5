"""What the three ways of setting up Celery share."""

from collections.abc import Sequence
from typing import Any

import redis
from celery import Celery
from sqlalchemy import create_engine, text
from sqlalchemy.exc import ProgrammingError

from benchmarks.peers.address import BROKER, RESULTS, SQLALCHEMY
from benchmarks.peers.peer import WORKERS, Peer, command


def application(name: str, backend: str, **settings: Any) -> Celery:
    """Return an application with its broker, its results, and what else is set."""
    app = Celery(name, broker=BROKER, backend=backend)
    app.conf.update(broker_connection_retry_on_startup=True, **settings)
    return app


class CeleryPeer(Peer):
    """Celery with a prefork pool."""

    def __init__(self, module: str, task: Any, interval_s: float) -> None:
        self._module = module
        self._task = task
        self._interval_s = interval_s

    def submit(self, count: int) -> None:
        for number in range(count):
            self._task.delay(number)

    def trip(self) -> None:
        self._task.delay(1).get(timeout=20, interval=self._interval_s)

    def commands(self) -> Sequence[Sequence[str]]:
        worker = ("worker", "--concurrency", str(WORKERS), "--loglevel", "ERROR")
        return [command("celery", "-A", self._module, *worker)]


class KeepingInRedis(CeleryPeer):
    """Its results are in Redis."""

    def done(self) -> int:
        return int(self._redis.dbsize())

    def __init__(self, module: str, task: Any) -> None:
        super().__init__(module, task, interval_s=0.5)  # results are signalled, not polled
        self._redis: Any = redis.Redis.from_url(RESULTS)


class KeepingInPostgreSQL(CeleryPeer):
    """Its results are in PostgreSQL, which is polled."""

    def __init__(self, module: str, task: Any) -> None:
        super().__init__(module, task, interval_s=0.005)
        self._engine = create_engine(SQLALCHEMY)

    def done(self) -> int:
        query = text("SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'")
        try:
            with self._engine.connect() as connection:
                return int(connection.execute(query).scalar_one())
        except ProgrammingError:  # the worker makes the table with its first result
            return 0
