"""Migrations: bringing the database to the schema that this version needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from alembic import command, op
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import TextClause, text
from sqlalchemy.exc import SQLAlchemyError

from sutazai import db
from sutazai.errors import ConfigurationError, DatabaseUnavailable

_LOCK = 0x5A7A2A1
"""Advisory lock, so that several processes that migrate at once take turns."""

_TAKE_TURN = text("SELECT pg_try_advisory_lock(:key)")

TURN_POLL_S = 0.2


def migrate() -> str:
    """Bring the schema up to date, and return its revision; raises `DatabaseUnavailable`."""
    try:
        with db.migrator().connect() as connection:
            while not connection.execute(_TAKE_TURN, {"key": _LOCK}).scalar_one():
                # Whoever waits within a statement would be waited for by the building of an index.
                connection.commit()
                time.sleep(TURN_POLL_S)
            connection.commit()
            command.upgrade(_config(), "head")
    except SQLAlchemyError as error:
        raise DatabaseUnavailable(f"The migration failed: {error}") from error
    except CommandError as error:
        raise ConfigurationError(
            f"The database cannot be migrated: {error}; was it used by a newer version?"
        ) from error
    return wanted()


def current() -> str | None:
    """Return the revision of the database; None: it was never migrated."""
    with db.transaction() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def wanted() -> str:
    """Return the revision that this version needs."""
    return ScriptDirectory.from_config(_config()).get_current_head() or ""


def build_index(
    name: str, columns: Sequence[str | TextClause], condition: str | None = None
) -> None:
    """Build an index of the tasks while they go on; for migrations."""
    drop_index(name)  # building that was interrupted has left one that is never used
    with op.get_context().autocommit_block():
        op.create_index(
            name,
            "tasks",
            [*columns],
            postgresql_where=None if condition is None else text(condition),
            postgresql_concurrently=True,
        )


def drop_index(name: str) -> None:
    """Drop an index of the tasks, if it is there, while they go on; for migrations."""
    with op.get_context().autocommit_block():
        op.drop_index(name, "tasks", if_exists=True, postgresql_concurrently=True)


def _config() -> Config:
    package = Path(__file__).parent
    folder = next(
        path
        for path in (package / "migrations", package.parent / "migrations")
        if (path / "env.py").exists()
    )
    config = Config()
    config.set_main_option("script_location", str(folder))
    return config
