"""Migrations on a real PostgreSQL: they make what the code declares, and they take turns."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from sutazai import db, migration
from sutazai.models import metadata
from tests.conftest import Servers
from tests.integration.served import until

INDEXES = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
MIGRATORS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = ''
"""
INVALID = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"


def indexes() -> set[tuple[str, str]]:
    return {(row.indexname, row.indexdef) for row in db.run(text(INDEXES))}


def downgrade(revision: str) -> None:
    command.downgrade(migration._config(), revision)


@pytest.fixture
def migrated_again(database: Servers) -> Iterator[Servers]:
    yield database
    migration.migrate()


def test_migrations_make_what_the_code_declares(database: Servers) -> None:
    with db.engine().connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    assert differences == []
    assert database


def test_the_readme_shows_the_newest_revision() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"The schema is at revision {migration.wanted()}.\n" in readme


def test_indexes_are_built_by_several_that_migrate_at_once(migrated_again: Servers) -> None:
    before = indexes()
    downgrade("0005")
    assert indexes() != before
    db.run(text("CREATE INDEX tasks_retryable ON tasks (state)"))  # as an interruption leaves one
    env = os.environ | {
        "SUTAZAI_HOME": str(migrated_again.home),
        "SUTAZAI_DATABASE_URL": migrated_again.database_url,
        "SUTAZAI_BROKER_URL": migrated_again.broker_url,
    }

    def migrate(_: int) -> str:
        argv = [sys.executable, "-m", "sutazai", "migrate"]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    with ThreadPoolExecutor(3) as pool, db.transaction() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": migration._LOCK})
        told = pool.map(migrate, range(3))
        until(lambda: db.run(text(MIGRATORS))[0][0] == 3, 30)
    assert list(told) == [f"The schema is at revision {migration.wanted()}.\n"] * 3
    assert indexes() == before
    assert db.run(text(INVALID))[0][0] == 0
