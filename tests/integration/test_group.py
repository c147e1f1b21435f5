"""Rows that are inserted or read together, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from sqlalchemy import text

from sutazai import admission, db, statements
from sutazai.agent import Agent, Context, NoParams
from sutazai.api import outcomes, store
from sutazai.api.group import MOST, Group
from sutazai.api.outcomes import Outcomes
from sutazai.errors import DatabaseUnavailable
from sutazai.models import new_id
from sutazai.submission import Options, Submission

pytestmark = pytest.mark.usefixtures("database")

agent = Agent("tester", port=9999, doc="Tests.")


@agent.action()
def work(params: NoParams, context: Context) -> NoParams:
    """Work."""
    return params


def submission(**options: Any) -> Submission:
    return Submission(work, {}, Options.model_construct(**options))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        try:
            return await work
        finally:
            await db.async_dispose()

    return asyncio.run(bounded())


def scalar(sql: str) -> Any:
    return db.run(text(sql))[0][0]


async def insert(group: Group, wanted: list[Submission]) -> list[Any]:
    inserts = (group.insert(each, rung=number % 2 == 0) for number, each in enumerate(wanted))
    return await asyncio.gather(*inserts, return_exceptions=True)


def test_rows_that_come_together_share_their_commits() -> None:
    wanted = [submission(labels={"n": str(number)}) for number in range(3 * MOST)]
    assert run(insert(Group(), wanted)) == [True] * len(wanted)
    assert scalar("SELECT count(*) FROM tasks") == len(wanted)
    assert scalar("SELECT count(DISTINCT xmin::text) FROM tasks") <= 3 + 1
    assert scalar("SELECT count(*) FROM tasks WHERE rings = 1") == len(wanted) / 2
    in_s = "extract(epoch FROM next_ring_at - created_at)::int"
    assert scalar(f"SELECT DISTINCT {in_s} FROM tasks WHERE rings = 1") == 15
    assert scalar(f"SELECT DISTINCT {in_s} FROM tasks WHERE rings = 0") == 0


def test_one_row_at_fault_costs_no_other() -> None:
    wanted = [submission(priority=10**6 if number == 20 else 5) for number in range(50)]
    found = run(insert(Group(), wanted))
    assert [each for each in found if each is not True] == [found[20]]
    assert isinstance(found[20], Exception)
    assert scalar("SELECT count(*) FROM tasks") == 49


def test_what_is_there_or_refused_is_not_inserted() -> None:
    again = submission()
    assert run(insert(Group(), [again])) == [True]
    assert run(insert(Group(), [again, again, submission()])) == [False, False, True]
    with db.transaction() as connection:
        connection.execute(statements.set_queue(agent.name, draining=True))
    assert run(insert(Group(), [submission() for _ in range(10)])) == [False] * 10


def test_who_has_given_up_waiting_is_not_inserted_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "WITHIN_S", 0.3)
    rows, sent = store.rows, 0

    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += 1
        return rows(*arguments, **options)

    monkeypatch.setattr(store, "rows", count)

    async def wait_behind_a_lock() -> None:
        group = Group()
        with db.transaction() as connection:
            connection.execute(text("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE"))
            inserts = [asyncio.create_task(insert(group, [submission()]))]
            while group._together._task is None or group._together._waiting:  # noqa: ASYNC110 - a few turns of the loop
                await asyncio.sleep(0)
            inserts += [asyncio.create_task(insert(group, [submission()])) for _ in range(5)]
            found = [each for [each] in await asyncio.gather(*inserts)]
            assert sent == 1, "those behind it are not sent: they would be told 503, and be there"
        await group._together.join()
        assert all(isinstance(each, DatabaseUnavailable) for each in found)
        assert scalar("SELECT count(*) FROM tasks") <= 1

    run(wait_behind_a_lock())


def test_all_who_are_woken_together_get_their_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [submission() for _ in range(30 * outcomes.MOST)]
    with db.transaction() as connection:
        admission.accept_many(connection, wanted, limit=None)
    queries, rows = [], store.rows

    async def counted(statement: Any, **options: Any) -> Any:
        queries.append(statement)
        return await rows(statement, **options)

    monkeypatch.setattr(store, "rows", counted)

    async def read() -> list[Any]:
        reading = Outcomes()
        ids = [each.task_id for each in wanted]
        return await asyncio.gather(*map(reading.of, [*ids, new_id()]))

    *found, nothing = run(read())
    assert [row.task_id for row in found] == [each.task_id for each in wanted]
    assert nothing is None
    assert len(queries) <= 30 + 2


def test_those_who_wait_to_read_hear_at_once_that_postgresql_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0

    async def away(statement: Any) -> Any:
        nonlocal asked
        asked += 1
        raise DatabaseUnavailable

    monkeypatch.setattr(store, "rows", away)

    async def read() -> list[Any]:
        reading = Outcomes()
        ids = [new_id() for _ in range(5 * outcomes.MOST)]
        return await asyncio.gather(*map(reading.of, ids), return_exceptions=True)

    assert {type(each) for each in run(read())} == {DatabaseUnavailable}
    assert asked == 1


def test_those_who_wait_to_be_inserted_hear_at_once_that_postgresql_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0

    async def away(statement: Any, **_: Any) -> Any:
        nonlocal asked
        asked += 1
        raise DatabaseUnavailable

    monkeypatch.setattr(store, "rows", away)
    found = run(insert(Group(), [submission() for _ in range(5 * MOST)]))
    assert {type(each) for each in found} == {DatabaseUnavailable}
    assert asked == 1
