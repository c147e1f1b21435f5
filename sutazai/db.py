"""Connections to PostgreSQL, and `transaction()`, the only place that commits.

Engines are made on first use and forgotten after a fork: a connection may not be shared between
processes. Every connection carries time-outs, because PostgreSQL's own defaults are none.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from sutazai import payload
from sutazai.errors import ConfigurationError, DatabaseUnavailable
from sutazai.settings import settings

STATEMENT_TIMEOUT_S = 10.0
"""For workers and the relay; fronts pass 2.5 s, so that a request is answered in time."""

_engine: Engine | None = None
_async_engine: AsyncEngine | None = None


def url() -> str:
    """Return the database's address as SQLAlchemy wants it, with psycopg 3 as the driver."""
    address = settings().database_url
    if not address:
        raise ConfigurationError("SUTAZAI_DATABASE_URL is not set.")
    return "postgresql+psycopg://" + address.split("://", 1)[1]


def engine() -> Engine:
    """Return this process's engine."""
    global _engine  # noqa: PLW0603 - one pool a process
    if _engine is None:
        _engine = create_engine(
            url(),
            pool_size=4,
            max_overflow=4,
            pool_timeout=5,
            json_serializer=payload.dumps,
            connect_args=connect_args(STATEMENT_TIMEOUT_S),
        )
    return _engine


def asynchronous() -> AsyncEngine:
    """Return this process's engine for event loops, as fronts use it."""
    global _async_engine  # noqa: PLW0603 - one pool a process
    if _async_engine is None:
        _async_engine = create_async_engine(
            url(),
            pool_size=8,
            max_overflow=0,
            pool_timeout=1,
            json_serializer=payload.dumps,
            connect_args=connect_args(2.5),
        )
    return _async_engine


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


def dispose() -> None:
    """Close this process's pooled connections (synchronous ones)."""
    global _engine  # noqa: PLW0603 - made again on next use
    if _engine is not None:
        _engine.dispose()
        _engine = None


def _translate(error: SQLAlchemyError) -> Exception:
    if isinstance(error, PoolTimeout):
        return DatabaseUnavailable("PostgreSQL is busy: no connection became free; try again.")
    original = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(original, psycopg.errors.QueryCanceled | psycopg.errors.LockNotAvailable):
        return DatabaseUnavailable("PostgreSQL did not answer in time; try again.")
    if isinstance(error, OperationalError | InterfaceError):
        return DatabaseUnavailable("PostgreSQL does not answer; try again shortly.")
    if isinstance(original, psycopg.errors.ReadOnlySqlTransaction):
        return DatabaseUnavailable("PostgreSQL is in read-only mode; nothing can be accepted.")
    return error


def _forget() -> None:
    # Dropping is enough: psycopg never closes a connection that another process opened.
    global _engine, _async_engine  # noqa: PLW0603 - see engine()
    _engine = _async_engine = None


os.register_at_fork(after_in_child=_forget)
