"""PostgreSQL that goes away in the middle of an attempt: nothing waits longer than it must."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Executable, text

from sutazai import admission, db, statements, worker
from sutazai.agent import Agent, Context, NoParams
from sutazai.errors import DatabaseUnavailable
from sutazai.keeper import Identity
from sutazai.relay import Relay
from sutazai.reports import Reports, Word
from sutazai.submission import Options, Submission

pytestmark = pytest.mark.usefixtures("database")

END_OTHERS = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE usename = current_user AND pid <> pg_backend_pid()"
)

agent = Agent("tester", port=9999, doc="Tests.")


class Seen(NoParams):
    attempt: int


@agent.action()
def work(params: NoParams, context: Context) -> Seen:
    """Work."""
    return Seen(attempt=context.attempt)


@agent.action(key_slots=1)
def single(params: NoParams, context: Context) -> Seen:
    """Run one at once of one key."""
    return Seen(attempt=context.attempt)


def accept(action: Any, **options: Any) -> UUID:
    with db.transaction() as connection:
        submission = Submission(action, {}, Options(**options))
        return admission.accept(connection, submission, rung=True).task_id


def site() -> worker.Site:
    nothing: Any = None
    identity = Identity("tester@here", "tester", "here")
    return worker.Site(identity, Reports(), {"tester": agent}, nothing, nothing)


def told(place: worker.Site) -> list[Word]:
    return [report.word for report in place.reports.read()]


def row(task_id: UUID) -> Any:
    return db.run(statements.task(task_id))[0]


@pytest.fixture
def answer_lost(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Executable]], None]:
    """Let PostgreSQL run and commit the statements of a verb, and the first answers get lost."""

    def lose(verb: Callable[..., Executable], times: int = 1) -> None:
        left = times
        made: list[Executable] = []
        reached = db.run

        def build(*args: Any, **values: Any) -> Executable:
            statement = verb(*args, **values)
            made.append(statement)
            return statement

        def run(statement: Executable) -> Any:
            nonlocal left
            rows = reached(statement)
            if statement in made and left:
                left -= 1
                raise DatabaseUnavailable("The connection was lost.")
            return rows

        monkeypatch.setattr(statements, verb.__name__, build)
        monkeypatch.setattr(db, "run", run)

    return lose


def test_a_claim_whose_answer_was_lost_is_still_ours(answer_lost: Any) -> None:
    task_id = accept(work)
    answer_lost(statements.claim)
    worker.perform(site(), work, task_id)
    assert (row(task_id).state, row(task_id).attempt) == ("succeeded", 1)


def test_a_task_that_another_worker_claimed_during_the_outage_is_not_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task_id = accept(work)
    reached = worker._try_claim

    def claim(action: Any, claimed_id: UUID, claimant: Any) -> Any:
        monkeypatch.setattr(worker, "_try_claim", reached)
        other = {**claimant, "claim_id": uuid4(), "worker": "tester@there"}
        assert reached(action, claimed_id, other) is not None
        raise DatabaseUnavailable("The connection was lost before the claim was sent.")

    monkeypatch.setattr(worker, "_try_claim", claim)
    with pytest.raises(worker.NotClaimed):
        worker.perform(site(), work, task_id)
    assert db.run(text("SELECT worker FROM tasks"))[0].worker == "tester@there"


def test_a_claim_under_a_key_whose_answer_was_lost_is_still_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task_id = accept(single, concurrency_key="one")
    reached = worker.lifecycle.claim

    def claim(*args: Any, **values: Any) -> Any:
        monkeypatch.setattr(worker.lifecycle, "claim", reached)
        connection = args[0]
        found = reached(*args, **values)
        connection.commit()
        assert found is not None
        raise DatabaseUnavailable("The connection was lost.")

    monkeypatch.setattr(worker.lifecycle, "claim", claim)
    worker.perform(site(), single, task_id)
    assert (row(task_id).state, row(task_id).attempt) == ("succeeded", 1)


def test_an_outcome_whose_answer_was_lost_counts_once(answer_lost: Any) -> None:
    task_id = accept(work)
    answer_lost(statements.finish)
    worker.perform(site(), work, task_id)
    assert [found["outcome"] for found in row(task_id).attempts] == ["succeeded"]


def test_an_outage_while_a_suspect_waits_to_be_alone_is_waited_out(answer_lost: Any) -> None:
    task_id = accept(work)
    db.run(text("UPDATE tasks SET alone = true"))
    answer_lost(statements.neighbours, times=2)
    place = site()
    worker.perform(place, work, task_id)
    assert row(task_id).state == "succeeded"
    assert told(place) == [Word.CLAIMING, Word.BEGAN, Word.BEGAN, Word.GONE]


def test_an_outage_that_outlasts_a_suspect_leaves_no_report_open(
    answer_lost: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = accept(work)
    db.run(text("UPDATE tasks SET alone = true"))
    monkeypatch.setattr(worker, "PATIENTLY", worker.PATIENTLY.copy(stop=lambda _: True))
    answer_lost(statements.neighbours)
    place = site()
    with pytest.raises(worker.Unrecorded):
        worker.perform(place, work, task_id)
    assert told(place) == [Word.CLAIMING, Word.BEGAN, Word.GONE]


class Rung:
    def __init__(self) -> None:
        self.notices: list[Any] = []

    def room(self, _agent: str, _priority: int) -> bool:
        return True

    def depth(self, _agent: str) -> int:
        return 1

    def levels(self, _agent: str) -> dict[int, int]:
        return {5: 1}

    def forgotten(self) -> None:
        return None

    def remember(self, _life: str) -> None:
        raise AssertionError

    def ring(self, notices: Any, pace: Any = None) -> None:
        self.notices += notices


def test_what_was_rung_before_an_outage_is_rung_again_after_it() -> None:
    """A crash forgets claims: the notice is used up, and the row is queued as if it were not."""

    host = Identity("tester@here", "tester", "here")
    with db.transaction() as connection:
        connection.execute(statements.enlist({**host.row, "slots": 1}))
    bell = Rung()
    relay = Relay(bell)
    relay.round()
    task_id = accept(work)
    passes = threading.Thread(target=relay.run)
    passes.start()
    try:
        assert not bell.notices, "its notice is out, for 15 s"
        db.run(END_OTHERS)
        _until(lambda: bell.notices)
    finally:
        relay.stop()
        passes.join(20)
    assert [notice.task_id for notice in bell.notices] == [task_id]


def test_a_relay_notices_an_outage_that_its_courier_has_noticed_before() -> None:
    relay = Relay(Rung())
    relay.round()
    db.run(text("SELECT 1"))
    with db.migrator().connect() as other:
        other.execute(END_OTHERS)
    with pytest.raises(DatabaseUnavailable):
        db.run(text("SELECT 1"))  # as the courier does, in the same process
    with pytest.raises(DatabaseUnavailable):
        relay.round()


def _until(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
