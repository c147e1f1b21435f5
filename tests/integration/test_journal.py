"""What an attempt tells, and that telling it never costs the outcome; on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import text

from sutazai import admission, db, journal, statements
from sutazai.agent import Agent, Context, NoParams
from sutazai.bell import Notice
from sutazai.errors import Unavailable
from sutazai.keeper import Identity
from sutazai.reports import Reports
from sutazai.submission import Submission
from sutazai.testing import NoSystem
from sutazai.worker import Requeued, Site, perform

pytestmark = pytest.mark.usefixtures("database")

agent = Agent("teller", port=9998, doc="Tells.")


class Lines(BaseModel):
    lines: int = 1
    width: int = 1


@agent.action()
def odd(params: NoParams, context: Context) -> NoParams:
    """Log fields with names that cannot be stored, or that are those of every line."""
    context.progress(float("nan"), "not a number")
    context.log.info(
        "odd",
        event="a field of that name",
        **{"a\0b": 1, "\ud800": 2, "at": "never", "level": "none"},
    )
    return NoParams()


@agent.action(max_attempts=4, retry_on=(Unavailable,))
def talk(params: Lines, context: Context) -> NoParams:
    """Log lines and fail, but for the last time."""
    for number in range(params.lines):
        context.log.info("line", number=number, padding="x" * params.width)
    if context.attempt < 4:
        raise Unavailable("again")
    return NoParams()


@agent.action()
def hurry(params: NoParams, context: Context) -> NoParams:
    """Tell the end many times, and then how it really is."""
    for number in range(50):
        context.progress(1.0, str(number))
    context.progress(0.9, "really")
    return NoParams()


class Silent:
    """A bell that nobody hears."""

    def room(self, agent: str, priority: int) -> bool:
        return True

    def depth(self, agent: str) -> int | None:
        return 0

    def levels(self, agent: str) -> dict[int, int] | None:
        return None

    def ring(self, notices: Sequence[Notice], pace: Any = None) -> None:
        pass


def run(action: Any, **params: Any) -> Any:
    """Perform a task, again and again while it is put back; return its row."""
    place = Site(
        Identity("teller@here", "teller", "here"),
        Reports(),
        {"teller": agent},
        NoSystem(),
        Silent(),
    )
    submission = Submission(action, params)
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=True)
    for _ in range(action.max_attempts):
        query("UPDATE tasks SET run_at = now()")  # no back-off
        try:
            perform(place, action, submission.task_id)
            break
        except Requeued:
            continue
    return db.run(statements.task(submission.task_id))[0]


def query(sql: str) -> Any:
    with db.transaction() as connection:
        return connection.execute(text(sql))


def told(kind: str) -> list[Any]:
    sql = f"SELECT data FROM task_events WHERE kind = '{kind}' ORDER BY event_id"
    return list(query(sql).scalars())


def test_fields_of_any_name_are_stored_and_never_stand_for_those_of_the_line() -> None:
    assert run(odd).state == "succeeded"
    [line] = told("log")
    assert (line["level"], line["event"]) == ("info", "odd")
    assert line["at"].endswith("Z")
    assert (line["a\ufffdb"], line["?"]) == (1, 2)


def test_lines_that_postgresql_refuses_cost_nothing_but_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal, "_storable", lambda name: name)
    monkeypatch.setattr(journal, "BATCH_MOST", 1)

    @agent.action()
    def partly(params: NoParams, context: Context) -> NoParams:
        """Log a line that is refused between two that are not."""
        for event in ("first", "\0", "last"):
            context.log.info(event)
        return NoParams()

    row = run(partly)
    assert (row.state, row.attempt) == ("succeeded", 1)
    assert [line["event"] for line in told("log")] == ["first", "last"]


@pytest.mark.parametrize(
    ("lines", "width", "stored"),
    [(1000, 1, 1000), (400, 1, 1000), (3, 200_000, 5)],
    ids=["all at first", "in parts", "by size"],
)
def test_the_bounds_of_a_journal_are_those_of_the_task(lines: int, width: int, stored: int) -> None:
    row = run(talk, lines=lines, width=width)
    assert (row.state, row.attempt) == ("succeeded", 4)
    found = told("log")
    assert len(found) == stored
    first = [line["number"] for line in found][:lines]
    assert first == list(range(lines))


def test_progress_is_told_once_a_second_and_at_the_end() -> None:
    row = run(hurry)
    last = {"fraction": 0.9, "message": "really"}
    assert row.progress == last
    assert told("progress") == [{"fraction": 1.0, "message": "0"}, last]
