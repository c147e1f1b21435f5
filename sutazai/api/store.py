"""Transactions of a front: bounded in time, because a client waits for the answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sutazai import db, statements
from sutazai.errors import DatabaseUnavailable, Deadlock

if TYPE_CHECKING:
    from sqlalchemy import Executable, Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from sutazai.db import Ready

WITHIN_S = 2.5
"""An answer about PostgreSQL's absence is promised within 3 s."""

_QUICKLY_S = 0.5

T = TypeVar("T")

Work = Callable[["AsyncConnection"], Awaitable[T]]


async def rows(statement: Executable | Ready, *, within_s: float = WITHIN_S) -> Sequence[Row[Any]]:
    """Run one statement and return its rows; raises `DatabaseUnavailable` when that takes too long.

    Doing it twice must be harmless: it is tried again when it fails quickly.
    """
    return await _bounded(_again(lambda: db.async_run(statement), harmless=True), within_s)


async def first(statement: Executable | Ready, *, within_s: float = WITHIN_S) -> Row[Any] | None:
    """Run one statement and return its first row, if it has one; else as `rows`."""
    return next(iter(await rows(statement, within_s=within_s)), None)


async def run(work: Work[T], *, within_s: float = WITHIN_S, again: bool = False) -> T:
    """Run work in one transaction; raises `DatabaseUnavailable` when that takes too long.

    again: doing it twice is harmless, so it is tried again when it fails quickly. After a deadlock
    it is tried again in any case: nothing was done.
    """

    async def transact() -> T:
        async with db.async_transaction() as connection:
            if within_s > WITHIN_S:
                # The connection's own limit is for what is answered at once.
                await connection.execute(statements.allow(within_s))
            return await work(connection)

    return await _bounded(_again(transact, harmless=again), within_s)


async def _again(work: Callable[[], Coroutine[Any, Any, T]], *, harmless: bool) -> T:
    began = time.monotonic()
    try:
        return await work()
    except Deadlock:
        pass
    except DatabaseUnavailable:
        # A pooled connection may be from before a restart of PostgreSQL; the next one is new.
        if not harmless or time.monotonic() - began > _QUICKLY_S:
            raise
    return await work()


async def _bounded(work: Coroutine[Any, Any, T], within_s: float) -> T:
    task = asyncio.ensure_future(work)
    try:
        # Not asyncio.timeout: a driver that is cancelled waits for a server that does not answer.
        done, _ = await asyncio.wait({task}, timeout=within_s)
    except asyncio.CancelledError:
        _abandon(task)
        raise
    if not done:
        _abandon(task)
        raise DatabaseUnavailable("PostgreSQL did not answer in time; try again.")
    return task.result()


def _abandon(task: asyncio.Future[Any]) -> None:
    task.cancel()
    task.add_done_callback(_forget)


def _forget(task: asyncio.Future[Any]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        task.exception()
