"""How tasks stand, read with one query for all the clients that are woken together.

Thousands may be: a query for each would keep the last of them waiting for a connection so long that
it was told nothing but that its task is accepted.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from sutazai import statements
from sutazai.api import store
from sutazai.api.together import Together
from sutazai.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from sqlalchemy import Row

MOST = 200
"""Rows of one query: a result may be large."""


class _Wanted(NamedTuple):
    task_id: UUID
    found: asyncio.Future[Row[Any] | None]


class Outcomes:
    """What one front reads for those who have waited."""

    def __init__(self) -> None:
        self._together = Together(self._read, MOST)

    async def of(self, task_id: UUID) -> Row[Any] | None:
        """Return how a task stands, as `statements.result`; None when there is none.

        Raises `DatabaseUnavailable`.
        """
        found: asyncio.Future[Row[Any] | None] = asyncio.get_running_loop().create_future()
        self._together.add(_Wanted(task_id, found))
        return await found

    async def _read(self, wanted: list[_Wanted]) -> None:
        try:
            read = await store.rows(statements.result(*{each.task_id for each in wanted}))
        except Exception as error:
            if isinstance(error, DatabaseUnavailable):
                # The others need not wait as long again to hear the same.
                wanted = [*wanted, *self._together.drop()]
            for each in wanted:
                if not each.found.done():
                    each.found.set_exception(error)
            return
        rows = {row.task_id: row for row in read}
        for each in wanted:
            if not each.found.done():
                each.found.set_result(rows.get(each.task_id))
