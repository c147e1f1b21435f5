"""Pages of tasks, and what is tried again: what they hold, and how much is read for them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from alembic import command
from sqlalchemy import Row, TextClause, text
from typer.testing import CliRunner

from sutazai import db, migration, statements
from sutazai.agent import RETENTION
from sutazai.api.tasks import Cursor
from sutazai.cli import app
from sutazai.models import new_id
from sutazai.state import State

pytestmark = pytest.mark.usefixtures("database")

START = datetime(2026, 1, 1, tzinfo=UTC)
AGENTS, ACTIONS, CODES = ("left", "right"), ("see", "say"), ("poison", "task_failed")
PARENTS = [new_id() for _ in range(3)]

INSERT = """
    INSERT INTO tasks (task_id, agent, action, state, labels, created_at, finished_at, parent_id,
                       retry_of, error, child_id)
    SELECT task_id, agent, action, state, labels, created_at, finished_at, parent_id, retry_of,
           error, child_id
    FROM jsonb_populate_recordset(NULL::tasks, CAST(:rows AS jsonb))
"""


def insert(rows: list[dict[str, Any]]) -> None:
    with db.transaction() as connection:
        connection.execute(text(INSERT), {"rows": json.dumps(rows, default=str)})


def at(hour: float) -> datetime:
    return START + timedelta(hours=hour)


def history() -> list[dict[str, Any]]:
    """Return rows of every kind; several of an instant, ids that say nothing of their time."""
    chance = random.Random(7)
    rows: list[dict[str, Any]] = []
    for _ in range(400):
        state, hour = chance.choice(list(State)), chance.randrange(60)
        rows.append(
            {
                "task_id": uuid4() if chance.random() < 0.3 else new_id(),
                "agent": chance.choice(AGENTS),
                "action": chance.choice(ACTIONS),
                "state": state.value,
                "labels": {
                    name: chance.choice("xyz") for name in ("a", "b") if chance.random() < 0.5
                },
                "created_at": at(hour),
                "finished_at": at(hour + chance.randrange(5)) if state.is_terminal else None,
                "parent_id": chance.choice([None, None, *PARENTS]),
                "retry_of": None,
                "error": {"code": chance.choice(CODES)} if state is State.FAILED else None,
                "child_id": None,
            }
        )
    return rows


def tried_again(rows: list[dict[str, Any]]) -> set[UUID]:
    """Try some of what has ended again, and let a parent delegate; return what that was."""
    ended = [row for row in rows if row["state"] in ("failed", "cancelled")]
    once, delegated = ended[::5], ended[1::5]
    for row in once:
        retry = {"task_id": new_id(), "retry_of": row["task_id"], "state": "queued"}
        rows.append({**row, **retry, "finished_at": None, "error": None})
    for row in delegated:
        row["parent_id"] = new_id()
        parent = {"task_id": row["parent_id"], "child_id": row["task_id"], "state": "succeeded"}
        rows.append({**row, **parent, "parent_id": None, "error": None})
    return {row["task_id"] for row in [*once, *delegated]}


def age(row: dict[str, Any]) -> tuple[datetime, UUID]:
    return row["created_at"], row["task_id"]


def walked(limit: int, **which: Any) -> list[UUID]:
    """Read page after page."""
    found: list[UUID] = []
    before = None
    with db.transaction() as connection:
        while page := connection.execute(
            statements.tasks_page(limit=limit, before=before, **which)
        ).all():
            found += [row.task_id for row in page]
            before = Cursor.read(str(Cursor(page[-1].created_at, page[-1].task_id)))
    return found


@pytest.mark.parametrize("agent", [None, "left"])
@pytest.mark.parametrize("action", [None, "say"])
@pytest.mark.parametrize("states", [[], ["failed"], ["queued", "succeeded", "waiting"]])
def test_pages_hold_all_that_fits_and_the_newest_first(
    agent: str | None, action: str | None, states: list[str]
) -> None:
    rows = history()
    insert(rows)
    for labels in ({}, {"a": "x"}, {"b": "y", "a": "z"}):
        for since, until in ((None, None), (at(10), None), (None, at(50)), (at(20), at(40))):
            for parent_id in (None, PARENTS[0]):
                fitting = [
                    row
                    for row in rows
                    if row["agent"] == (agent or row["agent"])
                    and row["action"] == (action or row["action"])
                    and row["state"] in (states or list(State))
                    and row["labels"].items() >= labels.items()
                    and (since or START) <= row["created_at"] < (until or at(1000))
                    and row["parent_id"] == (parent_id or row["parent_id"])
                ]
                found = walked(
                    17,
                    agent=agent,
                    action=action,
                    states=states,
                    labels=labels,
                    since=since,
                    until=until,
                    parent_id=parent_id,
                )
                newest = sorted(fitting, key=age, reverse=True)
                assert found == [row["task_id"] for row in newest], (labels, since, until)


@pytest.mark.parametrize("action", [None, "say"])
@pytest.mark.parametrize("code", [None, "poison"])
@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_what_is_tried_again_is_all_that_fits_and_the_oldest_first(
    action: str | None, code: str | None, state: str
) -> None:
    rows = history()
    left_out = tried_again(rows)
    insert(rows)
    ended = [
        row
        for row in rows
        if row["agent"] == "left" and row["state"] == state and row["task_id"] not in left_out
    ]
    for labels in ({}, {"a": "x"}):
        for since, until in ((None, None), (at(20), at(40))):
            fitting = [
                row["task_id"]
                for row in sorted(ended, key=age)
                if row["action"] == (action or row["action"])
                and (code is None or (row["error"] or {}).get("code") == code)
                and row["labels"].items() >= labels.items()
                and (since or START) <= row["finished_at"] < (until or at(1000))
            ]
            found = statements.replayable(
                agent="left",
                state=state,
                limit=20,
                action=action,
                code=code,
                since=since,
                until=until,
                labels=labels,
            )
            with db.transaction() as connection:
                ids = [row.task_id for row in connection.execute(found)]
            assert ids == fitting[:20], (labels, since)


# --- what they cost -------------------------------------------------------------------------

LONG = 20_000
PARENT = UUID(int=1)
RARE = 60
"""As many tasks have each of what is looked for, all of them old but the waiting ones."""

LONG_HISTORY = f"""
    INSERT INTO tasks (task_id, agent, action, state, labels, created_at, finished_at, parent_id,
                       error)
    SELECT uuidv7(), agent, action, state, labels, at,
           CASE WHEN state IN ('succeeded', 'failed') THEN at END,
           CASE WHEN n % 5 = 0 THEN CAST('{PARENT}' AS uuid) END,
           CASE WHEN state = 'failed' THEN jsonb_build_object('code', CASE n % 2
               WHEN 0 THEN 'rare' ELSE 'usual' END) END
    FROM (
        SELECT n, CASE WHEN n % 4 = 0 THEN 'other' ELSE 'tester' END AS agent,
               CASE WHEN n BETWEEN 1000 AND {1000 + 2 * RARE} THEN 'seldom' ELSE 'often' END
                   AS action,
               CASE WHEN n > {LONG - 2000} THEN 'queued'
                    WHEN n BETWEEN 2000 AND {2000 + 4 * RARE} THEN 'failed'
                    ELSE 'succeeded' END AS state,
               CASE WHEN n BETWEEN 3000 AND {3000 + 2 * RARE} THEN jsonb_build_object('a', 'rare')
                    WHEN n % 10 = 1 THEN jsonb_build_object('a', 'usual')
                    ELSE '{{}}' END AS labels,
               CAST('2026-01-01' AS timestamptz) + make_interval(mins => n) AS at
        FROM generate_series(1, {LONG}) AS n
    ) AS planned
"""


@pytest.fixture
def long_history(database: object) -> Iterator[None]:
    db.run(text(LONG_HISTORY))
    db.run(text("ANALYZE tasks, task_labels"))
    yield
    db.run(text("TRUNCATE tasks, task_labels"))  # or else it stays in the planner's statistics
    db.run(text("ANALYZE tasks, task_labels"))


def entries(wanted: TextClause) -> int:
    """Return how many entries of tables and indexes a statement has read."""
    explain = f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {wanted}"
    with db.transaction() as connection:
        [plan] = connection.execute(text(explain), wanted.compile().params).scalar_one()
    return _entries(plan["Plan"])


def _entries(node: dict[str, Any]) -> int:
    own = 0
    if "Relation Name" in node or node["Node Type"] == "Bitmap Index Scan":
        passed_over = node.get("Rows Removed by Filter", 0) + node.get(
            "Rows Removed by Index Recheck", 0
        )
        own = round((node["Actual Rows"] + passed_over) * node["Actual Loops"])
    return own + sum(_entries(child) for child in node.get("Plans", []))


@pytest.mark.usefixtures("long_history")
@pytest.mark.parametrize("agent", ["tester", None])
@pytest.mark.parametrize(
    "which",
    [
        {},
        {"states": ["succeeded"]},
        {"states": ["failed"]},
        {"states": ["running"]},
        {"states": ["failed", "cancelled", "waiting"]},
        {"action": "seldom"},
        {"action": "seldom", "states": ["succeeded"]},
        {"labels": {"a": "rare"}},
        {"labels": {"a": "usual"}},
        {"labels": {"a": "never"}},
        {"since": at(24), "until": at(48)},
        {"before": (at(24), UUID(int=0))},
        {"parent_id": PARENT},
        {"parent_id": UUID(int=0)},
    ],
    ids=str,
)
def test_a_page_is_not_looked_for_behind_what_it_does_not_show(
    agent: str | None, which: dict[str, Any]
) -> None:
    page = statements.tasks_page(limit=51, agent=agent, **which)
    # Of each action, agent and state it may read a page, and each task that it shows once more.
    assert entries(page) < 600


@pytest.mark.usefixtures("long_history")
@pytest.mark.parametrize(
    "which", [{}, {"action": "often"}, {"code": "rare"}, {"code": "never"}], ids=str
)
def test_what_is_tried_again_is_not_looked_for_among_all_that_ended(which: dict[str, Any]) -> None:
    assert entries(statements.replayable(agent="tester", state="failed", limit=50, **which)) < 600


@pytest.mark.usefixtures("long_history")
def test_what_has_failed_since_the_last_statistics_is_not_all_read() -> None:
    db.run(text("DELETE FROM tasks WHERE state = 'failed'"))
    db.run(text("ANALYZE tasks"))
    failed = "state = 'failed', error = jsonb_build_object('code', 'usual')"
    db.run(text(f"UPDATE tasks SET {failed} WHERE state = 'succeeded' AND action = 'often'"))
    assert entries(statements.tasks_page(limit=51, agent="tester", states=["failed"])) < 600
    assert entries(statements.replayable(agent="tester", state="failed", limit=50)) < 600


# --- labels ---------------------------------------------------------------------------------


def labelled(**which: Any) -> list[Row[Any]]:
    with db.transaction() as connection:
        return list(connection.execute(statements.tasks_page(limit=10, **which)))


def old_and_labelled(task_id: UUID) -> dict[str, Any]:
    return {
        "task_id": task_id,
        "agent": "left",
        "action": "see",
        "state": "succeeded",
        "labels": {"a": "x", "b": "y"},
        "created_at": at(0),
        "finished_at": datetime.now(UTC) - 2 * RETENTION,
    }


def test_labels_are_forgotten_with_their_task() -> None:
    old, young = new_id(), new_id()
    insert([old_and_labelled(old), {**old_and_labelled(young), "finished_at": datetime.now(UTC)}])
    with db.transaction() as connection:
        connection.execute(statements.prepare_prune())
        pruned = connection.execute(statements.prune({}, otherwise=RETENTION, limit=10))
        assert pruned.scalar_one() == 1
    assert [row.task_id for row in labelled(labels={"b": "y"})] == [young]
    left = db.run(text("SELECT task_id FROM task_labels"))
    assert [row.task_id for row in left] == [young, young]


@pytest.fixture
def migrated_again(database: object) -> Iterator[None]:
    yield
    migration.migrate()


@pytest.mark.usefixtures("migrated_again")
def test_tasks_of_before_the_migration_are_found_by_their_labels() -> None:
    before, after = new_id(), new_id()
    command.downgrade(migration._config(), "0008")
    insert([old_and_labelled(before)])
    migration.migrate()
    insert([old_and_labelled(after)])
    assert [row.task_id for row in labelled(labels={"a": "x"})] == [after, before]


def test_a_page_of_the_command_line_goes_on_after_a_task() -> None:
    ids = [new_id() for _ in range(3)]
    insert([{**old_and_labelled(each), "created_at": at(hour)} for hour, each in enumerate(ids)])

    def listed(*arguments: str) -> list[str]:
        done = CliRunner().invoke(app, ["tasks", "list", "--json", *arguments])
        return [task["task_id"] for task in json.loads(done.output)]

    assert listed("--limit", "2") == [str(ids[2]), str(ids[1])]
    assert listed("--before", str(ids[1])) == [str(ids[0])]
    raised = CliRunner().invoke(app, ["tasks", "list", "--before", str(new_id())]).exception
    assert "There is no task" in str(raised)
