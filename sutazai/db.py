"""Connections to PostgreSQL, and the only place that commits: `transaction()` and `run()`.

Engines are made on first use and forgotten after a fork: a connection may not be shared between
processes. Every connection carries time-outs, because PostgreSQL's own defaults are none.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import namedtuple_row
from psycopg.types.json import set_json_loads
from sqlalchemy import (
    Connection,
    CursorResult,
    Engine,
    Executable,
    Row,
    TextClause,
    create_engine,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool
from sqlalchemy.util import greenlet_spawn

from sutazai import payload
from sutazai.errors import ConfigurationError, DatabaseBusy, DatabaseUnavailable, Deadlock
from sutazai.settings import settings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

set_json_loads(orjson.loads)

STATEMENT_TIMEOUT_S = 10.0
"""For workers and the relay; fronts pass 2.5 s, so that a request is answered in time."""


class Ready(NamedTuple):
    """SQL text and its values: `run` hands them to the driver; in a transaction `execute(*ready)`.

    Binding values to a text as SQLAlchemy does costs more than to run it.
    """

    text: TextClause
    values: Mapping[str, Any]


REFUSALS = (SQLAlchemyError, psycopg.Error)
"""What `run` and `transaction` raise when PostgreSQL answers, but does not do what it is asked."""

_engines: dict[bool, Engine] = {}
_async_engines: dict[bool, AsyncEngine] = {}
"""By whether each statement commits by itself; one pool a process and kind."""


def url() -> str:
    """Return the database's address as SQLAlchemy wants it, with psycopg 3 as the driver."""
    address = settings().database_url
    if not address:
        raise ConfigurationError("SUTAZAI_DATABASE_URL is not set.")
    return "postgresql+psycopg://" + address.split("://", 1)[1]


def engine(*, autocommit: bool = False) -> Engine:
    """Return this process's engine."""
    if autocommit not in _engines:
        _engines[autocommit] = create_engine(
            url(),
            pool_size=4,
            max_overflow=4,
            pool_timeout=5,
            **_options(autocommit, STATEMENT_TIMEOUT_S),
        )
    return _engines[autocommit]


def asynchronous(*, autocommit: bool = False) -> AsyncEngine:
    """Return this process's engine for event loops, as fronts use it."""
    if autocommit not in _async_engines:
        from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - only for fronts

        _async_engines[autocommit] = create_async_engine(
            url(),
            pool_size=8,
            max_overflow=0,
            pool_timeout=1,
            **_options(autocommit, 2.5),
        )
    return _async_engines[autocommit]


def _options(autocommit: bool, statement_timeout_s: float) -> dict[str, Any]:
    own: dict[str, Any] = (
        # Nothing is left to roll back when each statement has committed by itself.
        {"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None} if autocommit else {}
    )
    return own | {
        "json_serializer": payload.dumps,
        "connect_args": connect_args(statement_timeout_s),
    }


def connect_args(statement_timeout_s: float) -> dict[str, Any]:
    """Return psycopg's arguments of every connection: nothing may wait for ever."""
    return {
        "connect_timeout": 2,
        "tcp_user_timeout": 15_000,
        "application_name": "sutazai",
        "options": (
            f"-c statement_timeout={int(statement_timeout_s * 1000)} -c lock_timeout=2000"
            " -c idle_in_transaction_session_timeout=15000 -c timezone=UTC"
        ),
    }


def migrator() -> Engine:
    """Return an engine of one connection without statement time-outs, for migrations."""
    return create_engine(url(), poolclass=NullPool, connect_args={"connect_timeout": 5})


@contextmanager
def transaction() -> Iterator[Connection]:
    """Run statements in one transaction: committed on leaving, rolled back on an error.

    Raises `DatabaseUnavailable` when PostgreSQL cannot be reached or goes away meanwhile.
    """
    try:
        with engine().begin() as connection:
            yield connection
    except SQLAlchemyError as error:
        raise _translate(error) from error


@asynccontextmanager
async def async_transaction() -> AsyncIterator[AsyncConnection]:
    """Do the same as `transaction` on an event loop."""
    try:
        async with asynchronous().begin() as connection:
            yield connection
    except SQLAlchemyError as error:
        raise _translate(error) from error


def run(statement: Executable | Ready) -> Sequence[Any]:
    """Run one statement, which commits by itself in one round trip; return its rows.

    SQL text goes straight to the driver, which costs a fraction of SQLAlchemy's execution; it is
    what every task passes through. Raises `DatabaseUnavailable`, as `transaction` does.
    """
    try:
        if not isinstance(statement, TextClause | Ready):
            with engine(autocommit=True).connect() as connection:
                return _rows(connection.execute(statement))
        pooled = engine(autocommit=True).raw_connection()
        driver: Any = pooled.driver_connection
        try:
            cursor = driver.cursor(row_factory=namedtuple_row).execute(*_for_driver(statement))
            return cursor.fetchall() if cursor.pgresult.nfields else []
        finally:
            if _is_usable(driver):
                pooled.close()
            else:
                # Most likely the server restarted: what else is pooled is broken too.
                pooled.invalidate()
                engine(autocommit=True).dispose()
    except (SQLAlchemyError, psycopg.Error) as error:
        raise _translate(error) from error


async def async_run(statement: Executable | Ready) -> Sequence[Any]:
    """Do the same as `run` on an event loop."""
    try:
        if not isinstance(statement, TextClause | Ready):
            async with asynchronous(autocommit=True).connect() as connection:
                return _rows(await connection.execute(statement))
        pooled = await asynchronous(autocommit=True).raw_connection()
        driver: Any = pooled.driver_connection
        try:
            cursor = driver.cursor(row_factory=namedtuple_row)
            await cursor.execute(*_for_driver(statement))
            return await cursor.fetchall() if cursor.pgresult.nfields else []
        finally:
            if _is_usable(driver):
                pooled.close()
            else:
                await greenlet_spawn(pooled.invalidate)
                await asynchronous(autocommit=True).dispose()
    except (SQLAlchemyError, psycopg.Error) as error:
        raise _translate(error) from error


def _rows(result: CursorResult[Any]) -> Sequence[Row[Any]]:
    return result.all() if result.returns_rows else []


def _for_driver(statement: TextClause | Ready) -> tuple[str, Mapping[str, Any]]:
    if isinstance(statement, Ready):
        return _driver_sql(statement.text.text), statement.values
    # SQLAlchemy has no public way to the values bound to a text.
    values = {name: bound.value for name, bound in statement._bindparams.items()}
    return _driver_sql(statement.text), values


@cache
def _driver_sql(sql: str) -> str:
    return _PARAMETER.sub(r"%(\1)s", sql.replace("%", "%%"))


_PARAMETER = re.compile(r"(?<!:):([a-z_]+)")


def _is_usable(driver: Any) -> bool:
    """Whether a connection may go back to its pool: not broken, not amid a cancelled statement."""
    return not driver.closed and driver.info.transaction_status == TransactionStatus.IDLE


def dispose() -> None:
    """Close this process's pooled connections (synchronous ones)."""
    while _engines:
        _engines.popitem()[1].dispose()


async def async_dispose() -> None:
    """Close this process's pooled connections of its event loop."""
    while _async_engines:
        await _async_engines.popitem()[1].dispose()


def _translate(error: Exception) -> Exception:
    if isinstance(error, PoolTimeout):
        return DatabaseBusy("PostgreSQL is busy: no connection became free; try again.")
    original = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(original, psycopg.errors.QueryCanceled | psycopg.errors.LockNotAvailable):
        return DatabaseBusy()
    if isinstance(original, psycopg.errors.DeadlockDetected):
        return Deadlock()
    if isinstance(original, psycopg.errors.ReadOnlySqlTransaction):
        return DatabaseUnavailable("PostgreSQL is in read-only mode; nothing can be accepted.")
    if isinstance(original, psycopg.OperationalError | psycopg.InterfaceError):
        return DatabaseUnavailable("PostgreSQL does not answer; try again shortly.")
    return error


def _forget() -> None:
    # Dropping is enough: psycopg never closes a connection that another process opened.
    _engines.clear()
    _async_engines.clear()


os.register_at_fork(after_in_child=_forget)
