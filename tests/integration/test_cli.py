"""What commands hand over and find, on a real PostgreSQL; `sutazai` works on the database alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from sutazai import db
from sutazai.cli import app
from sutazai.errors import InvalidInput, KeyReused, UnknownAction
from sutazai.settings import override
from tests.conftest import Servers

AGENT = "task-assignment-coordinator"


@pytest.fixture(autouse=True)
def _database(database: Servers) -> Iterator[None]:
    override(callback_secret="secret")
    yield
    override(callback_secret=None)


def told(*arguments: str, stdin: str | None = None) -> Any:
    """Run a command and return the JSON that it prints; raises what it refuses with."""
    done = CliRunner().invoke(app, arguments, input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def submit(*options: str) -> str:
    task_id: str = told("submit", AGENT, "describe", "--no-wait", *options)["task_id"]
    return task_id


def ids(*arguments: str) -> list[str]:
    return [task["task_id"] for task in told("tasks", "list", *arguments, "--json")]


def query(sql: str, **values: Any) -> Any:
    with db.transaction() as connection:
        return connection.execute(text(sql), values)


# --- submit and list ------------------------------------------------------------------------


def test_a_task_is_submitted_with_all_options_that_a_route_takes() -> None:
    task_id = submit(
        *("--run-at", "2100-01-01T00:00:00Z", "--deadline-at", "2100-01-02T00:00:00+01:00"),
        *("--max-attempts", "3", "--time-limit", "2.5", "--priority", "7"),
        *("--concurrency-key", "c", "--on-conflict", "join", "--idempotency-key", "k"),
        *("--callback-url", "https://example.com/x", "--label", "a=b", "--label", "c=d=e"),
    )
    row = query("SELECT * FROM tasks").one()
    assert str(row.task_id) == task_id
    assert row.run_at.isoformat() == "2100-01-01T00:00:00+00:00"
    assert row.deadline_at.isoformat() == "2100-01-01T23:00:00+00:00"
    assert (row.max_attempts, row.time_limit_s, row.priority) == (3, 2.5, 7)
    assert (row.concurrency_key, row.idempotency_key) == ("c", "k")
    assert (row.callback_url, row.labels) == ("https://example.com/x", {"a": "b", "c": "d=e"})
    joined = submit("--concurrency-key", "c", "--on-conflict", "join")
    assert joined == task_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--label", "x"), "--label 'x': give it as key=value"),
        (("--run-at", "tomorrow"), "run_at: "),
        (("--on-conflict", "hope"), "on_conflict: "),
        (("--time-limit", "0"), "time_limit_s: "),
        (("--callback-url", "http://127.0.0.1/"), "options.callback_url"),
    ],
)
def test_an_option_that_cannot_be_taken_is_named(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        submit(*options)
    assert str(refused.value).startswith(message)


def test_tasks_are_listed_by_label_time_and_parent() -> None:
    first, second, third = submit("--label", "a=b"), submit("--label", "a=c"), submit()
    query("UPDATE tasks SET created_at = '2026-01-01T00:00:00Z' WHERE task_id = :id", id=first)
    query("UPDATE tasks SET parent_id = :parent WHERE task_id = :id", id=third, parent=first)
    assert ids() == [third, second, first]
    assert ids("--limit", "2") == [third, second]
    assert ids("--label", "a=b") == [first]
    assert ids("--since", "2026-02-01T00:00:00Z") == [third, second]
    assert ids("--until", "2026-02-01T00:00:00Z") == [first]
    assert ids("--parent", first) == [third]
    with pytest.raises(InvalidInput, match="label"):
        ids("--label", "a")


# --- batch ----------------------------------------------------------------------------------

LINES = (
    '{"action": "describe"}\n\n{"action": "describe", "params": {}, '
    '"options": {"priority": 9, "labels": {"a": "b"}}}\n'
)


def test_a_batch_is_read_from_a_file_or_stdin(tmp_path: Path) -> None:
    file = tmp_path / "batch.jsonl"
    file.write_text(LINES)
    made = told("batch", AGENT, str(file))["task_ids"]
    made += told("batch", AGENT, "-", stdin=LINES)["task_ids"]
    rows = query("SELECT task_id, priority, source FROM tasks ORDER BY task_id").all()
    assert [str(row.task_id) for row in rows] == made
    assert [(row.priority, row.source) for row in rows] == [(5, "cli"), (9, "cli")] * 2
    assert len(ids("--label", "a=b")) == 2


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{", InvalidInput, "Line 4: The body is not valid JSON"),
        ("[]", InvalidInput, "Line 4: it must be a JSON object."),
        ('{"action": "nope"}', UnknownAction, f"Line 4: {AGENT} has no action 'nope'"),
        ('{"action": "describe", "priority": 1}', InvalidInput, "Line 4: priority: "),
        ('{"action": "describe", "options": {"priority": "1"}}', InvalidInput, "Line 4: options"),
        (
            '{"action": "describe", "options": {"idempotency_key": "k", "priority": 1}}',
            KeyReused,
            "The idempotency key 'k'",
        ),
    ],
)
def test_a_batch_is_accepted_as_a_whole_or_not_at_all(
    line: str, error: type[Exception], message: str
) -> None:
    submit("--idempotency-key", "k")
    with pytest.raises(error) as refused:
        told("batch", AGENT, "-", stdin=LINES + line)
    assert str(refused.value).startswith(message)
    assert len(ids()) == 1


def test_a_refused_batch_is_one_line_and_ends_with_2(database: Servers) -> None:
    env = os.environ | {
        "SUTAZAI_HOME": str(database.home),
        "SUTAZAI_DATABASE_URL": database.database_url,
        "SUTAZAI_BROKER_URL": database.broker_url,
    }
    done = subprocess.run(
        [sys.executable, "-m", "sutazai", "batch", AGENT, "-"],
        env=env,
        input="",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sutazai: A batch has 1 to 10000 tasks; this one has 0.\n"


# --- retry ----------------------------------------------------------------------------------


def end(task_id: str, state: str, at: str = "2026-02-01T00:00:00Z") -> None:
    query(
        "UPDATE tasks SET state = :state, finished_at = :at, next_ring_at = NULL, "
        """error = '{"code": "x", "message": "x"}' WHERE task_id = :id""",
        id=UUID(task_id),
        state=state,
        at=at,
    )


def retried(*options: str) -> set[str]:
    made = told("tasks", "retry", "--agent", AGENT, *options)["task_ids"]
    found = query("SELECT retry_of FROM tasks WHERE task_id = ANY(:made)", made=made)
    return {str(task_id) for task_id in found.scalars()}


def test_tasks_are_tried_again_by_state_time_and_label() -> None:
    early, late, labelled, cancelled = submit(), submit(), submit("--label", "a=b"), submit()
    end(early, "failed", "2026-01-01T00:00:00Z")
    for task_id in (late, labelled):
        end(task_id, "failed")
    end(cancelled, "cancelled")
    assert retried("--until", "2026-01-15T00:00:00Z") == {early}
    assert retried("--since", "2026-03-01T00:00:00Z") == set()
    assert retried("--label", "a=b") == {labelled}
    assert retried("--state", "cancelled") == {cancelled}
    assert retried("--since", "2026-01-15T00:00:00Z") == {late}
    with pytest.raises(InvalidInput, match="state: "):
        retried("--state", "succeeded")
    with pytest.raises(InvalidInput, match="goes with --agent"):
        told("tasks", "retry", late, "--label", "a=b")
