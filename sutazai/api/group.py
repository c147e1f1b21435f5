"""Group commit: requests that arrive together share one INSERT, and one wait for the disk.

While the writer is busy, rows wait for each other; a row that comes alone waits for nobody.
"""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

from sutazai import statements
from sutazai.api import store
from sutazai.api.together import Together
from sutazai.errors import DatabaseUnavailable
from sutazai.submission import Submission

MOST = 100
"""Rows of one INSERT: more would make the first of them wait too long."""

LEAST_S = 0.4
"""What a statement is given at least; with `store.WITHIN_S` still an answer within 3 s."""


class _Waiting(NamedTuple):
    submission: Submission
    rung: bool
    inserted: asyncio.Future[bool]
    since: float


class Group:
    """The rows that one front inserts, several with one statement when they come together."""

    def __init__(self) -> None:
        self._together = Together(self._write, MOST)

    async def insert(self, submission: Submission, *, rung: bool) -> bool:
        """Insert a task's row, committed; False: there is a reason why not, or it is there already.

        It has neither an idempotency key nor a conflict to resolve. Raises `DatabaseUnavailable`
        when that takes too long, and then it may be there or not.
        """
        inserted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._together.add(_Waiting(submission, rung, inserted, time.monotonic()))
        return await inserted

    async def _write(self, taken: list[_Waiting]) -> None:
        # A row has no timer of its own: those of one statement share what is left to the first.
        now = time.monotonic()
        late = [row for row in taken if row.since + store.WITHIN_S <= now]
        self._refuse(late, DatabaseUnavailable("PostgreSQL did not answer in time; try again."))
        if rows := [row for row in taken if not row.inserted.done()]:
            await self._insert(rows, max(rows[0].since + store.WITHIN_S, now + LEAST_S))

    async def _insert(self, rows: list[_Waiting], until: float) -> None:
        try:
            if len(rows) == 1:
                statement = statements.accept(rows[0].submission.row, rung=rows[0].rung)
            else:
                rung = {row.submission.task_id for row in rows if row.rung}
                statement = statements.accept_many([row.submission.row for row in rows], rung=rung)
            found = {
                row.task_id
                for row in await store.rows(statement, within_s=until - time.monotonic())
            }
        except DatabaseUnavailable as error:
            # Those who wait behind them have waited long too, and would not fare better.
            self._refuse([*rows, *self._together.drop()], error)
        except Exception as error:
            if len(rows) == 1:
                self._refuse(rows, error)
            else:
                # One of them is at fault, and the others must not pay for it.
                for row in rows:
                    await self._insert([row], until)
        else:
            for row in rows:
                if not row.inserted.done():
                    row.inserted.set_result(row.submission.task_id in found)

    @staticmethod
    def _refuse(rows: list[_Waiting], error: Exception) -> None:
        for row in rows:
            if not row.inserted.done():
                row.inserted.set_exception(error)
