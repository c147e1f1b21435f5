"""procrastinate, which needs PostgreSQL alone."""

import asyncio
from collections.abc import Sequence
from typing import Any

import procrastinate
import psycopg

from benchmarks.peers.address import DATABASE
from benchmarks.peers.looped import LoopedPeer
from benchmarks.peers.peer import WORKERS, command

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=DATABASE))


@app.task(queue="bench")
async def echo(number: int) -> int:
    """Return the number."""
    return number


class Measured(LoopedPeer):
    """This application, with ten tasks at once a process."""

    def __init__(self) -> None:
        super().__init__()
        self.run(self._open())
        self._connection = psycopg.connect(DATABASE, autocommit=True)

    async def _open(self) -> None:
        await app.open_async()
        await app.schema_manager.apply_schema_async()

    async def send(self, number: int) -> Any:
        return await echo.defer_async(number=number)

    async def receive(self, sent: Any) -> None:
        while self._value(_STATE, sent) != "succeeded":  # noqa: ASYNC110 - as often as others ask
            await asyncio.sleep(0.002)

    def done(self) -> int:
        return int(self._value(_DONE))

    def _value(self, query: bytes, *values: Any) -> Any:
        row = self._connection.execute(query, values).fetchone()
        return row[0] if row else None

    def commands(self) -> Sequence[Sequence[str]]:
        worker = ("worker", "-q", "bench", "--concurrency", "10")
        return [command("procrastinate", f"--app={__name__}.app", *worker)] * WORKERS


_STATE = b"SELECT status FROM procrastinate_jobs WHERE id = %s"
_DONE = b"SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'"
