"""Several tasks that one notice names, taken by one process, on a real PostgreSQL."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel
from sqlalchemy import text

from sutazai import admission, db, hand, keeper, lifecycle, statements, worker
from sutazai.agent import Agent, Context, NoParams
from sutazai.bell import Notice
from sutazai.errors import DatabaseUnavailable, Unavailable
from sutazai.keeper import Identity, Keeper
from sutazai.models import new_id
from sutazai.reports import Reports, Word
from sutazai.state import State
from sutazai.submission import Options, Submission
from sutazai.testing import NoSystem
from sutazai.worker import NotClaimed, Site

pytestmark = pytest.mark.usefixtures("database")

agent = Agent("tester", port=9999, doc="Tests.")


class Number(BaseModel):
    number: int = 0


@agent.action(max_attempts=2, retry_on=(Unavailable,))
def work(params: Number, context: Context) -> Number:
    """Do as the number says."""
    match params.number:
        case 1:
            raise ValueError("no luck")
        case 2:
            raise Unavailable("not now")
        case 3:
            raise KeyboardInterrupt  # as the worker's drain does
        case 4:
            db.run(text("UPDATE tasks SET claim_id = uuidv7() WHERE params = '{\"number\": 4}'"))
        case 5:
            ended = text("SELECT 1 FROM tasks WHERE state = 'succeeded'")
            pause = threading.Event()
            assert any(db.run(ended) or pause.wait(0.01) for _ in range(500))
    return params


@agent.action(rerun_after_crash=False)
def once(params: NoParams, context: Context) -> NoParams:
    """Run once."""
    return params


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(hand, "LATE_S", 60.0)  # however busy the machine is
    identity = Identity("tester@here", "tester", "here")
    nothing: Any = None
    return Site(identity, Reports(), {"tester": agent}, NoSystem(), nothing)


def accept(*numbers: int, **options: Any) -> list[UUID]:
    made = [Submission(work, {"number": number}, Options(**options)) for number in numbers]
    with db.transaction() as connection:
        for submission in made:
            admission.accept(connection, submission, rung=True)
    return [submission.task_id for submission in made]


def rows(ids: list[UUID]) -> list[Any]:
    return [db.run(statements.task(task_id))[0] for task_id in ids]


def states(ids: list[UUID]) -> list[str]:
    return [row.state for row in rows(ids)]


def outcomes(task_id: UUID) -> list[str]:
    return [attempt["outcome"] for attempt in rows([task_id])[0].attempts or []]


def words(site: Site) -> list[Word]:
    return [report.word for report in site.reports.read()]


def test_all_are_claimed_together_run_in_order_and_recorded_together(site: Site) -> None:
    ids = accept(*range(10, 18))
    told = hand.perform_all(site, work, ids)
    assert [(each.task_id, each.state) for each in told] == [
        (task_id, State.SUCCEEDED) for task_id in ids
    ]
    assert [row.result["number"] for row in rows(ids)] == list(range(10, 18))
    assert db.run(text("SELECT count(DISTINCT xmin::text) FROM tasks"))[0][0] == 1
    assert db.run(text("SELECT count(DISTINCT xmin::text) FROM attempts"))[0][0] == 1
    assert db.run(text("SELECT count(DISTINCT claim_id) FROM tasks"))[0][0] == 8
    instants = [instant for row in rows(ids) for instant in (row.started_at, row.finished_at)]
    assert instants == sorted(instants), "each has its own time, one after the other"
    assert all(attempt["outcome"] == "succeeded" for row in rows(ids) for attempt in row.attempts)
    told_of = words(site)
    assert told_of[:16] == [Word.CLAIMING] * 8 + [Word.TAKEN] * 8
    assert told_of[16:] == [Word.BEGAN, Word.DONE] * 8 + [Word.GONE] * 8


def test_one_that_fails_or_is_tried_again_is_no_other_ones_business(site: Site) -> None:
    ids = accept(10, 1, 2, 11)
    told = hand.perform_all(site, work, ids)
    expected = [State.SUCCEEDED, State.FAILED, State.QUEUED, State.SUCCEEDED]
    assert [each.state for each in told] == expected
    assert states(ids) == expected
    assert rows(ids)[1].error["message"] == "ValueError: no luck"
    assert [outcomes(task_id) for task_id in ids] == [
        ["succeeded"], ["failed"], ["failed"], ["succeeded"]
    ]  # fmt: skip
    assert words(site).count(Word.GONE) == 4


def test_those_behind_one_that_takes_long_are_put_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = accept(10, 11, 12)
    monkeypatch.setattr(hand, "LATE_S", 0.0)
    hand.perform_all(site, work, ids)
    assert states(ids) == ["succeeded", "queued", "queued"]
    assert outcomes(ids[1]) == ["released"]
    again = text("SELECT failures, crashes, rings FROM tasks WHERE next_ring_at <= now()")
    assert [tuple(row) for row in db.run(again)] == [(0, 0, 0)] * 2, "uncharged, and due at once"


def test_a_drain_records_what_has_ended_and_puts_back_the_rest(site: Site) -> None:
    ids = accept(10, 3, 11)
    with pytest.raises(KeyboardInterrupt):
        hand.perform_all(site, work, ids)
    assert states(ids) == ["succeeded", "queued", "queued"]
    assert [outcomes(task_id) for task_id in ids] == [["succeeded"], ["released"], ["released"]]
    assert words(site).count(Word.GONE) == 3


def test_a_drain_while_outcomes_are_recorded_loses_none(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = accept(10, 11, 12)
    monkeypatch.setattr(hand, "LATE_S", 0.0)
    reached = db.run
    stopped = []

    def run(statement: Any) -> Any:
        if not stopped and statement[0] is statements._FINISH_MANY:
            stopped.append(statement)
            raise SystemExit
        return reached(statement)

    monkeypatch.setattr(db, "run", run)
    with pytest.raises(SystemExit):
        hand.perform_all(site, work, ids)
    assert states(ids) == ["succeeded", "queued", "queued"]
    assert words(site).count(Word.GONE) == 3


def test_what_was_put_back_comes_by_itself(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = accept(10, 11)
    monkeypatch.setattr(hand, "LATE_S", 0.0)
    hand.perform_all(site, work, ids)
    [again] = [Notice(*row) for row in db.run(statements.ring_unrung("tester", 9))]
    assert (again.task_id, again.is_plain) == (ids[1], False)


def test_what_cannot_be_taken_together_is_taken_by_itself(site: Site) -> None:
    ids = [*accept(10), *accept(11, concurrency_key="one"), *accept(12)]
    hand.perform_all(site, work, ids)
    assert states(ids) == ["succeeded"] * 3
    with db.transaction() as connection:
        submission = Submission(once, {})
        admission.accept(connection, submission, rung=True)
    hand.perform_all(site, once, [submission.task_id])
    assert states([submission.task_id]) == ["succeeded"]
    assert words(site).count(Word.TAKEN) == 2


def test_what_is_not_there_any_more_is_left_out(site: Site) -> None:
    ids = accept(10, 11)
    with db.transaction() as connection:
        lifecycle.cancel(connection, ids[0])
    told = hand.perform_all(site, work, [new_id(), *ids, ids[1]])
    assert [each.task_id for each in told] == [ids[1]]
    assert states(ids) == ["cancelled", "succeeded"]
    with pytest.raises(NotClaimed):
        hand.perform_all(site, work, ids)


def test_one_that_lost_its_lease_records_nothing_and_the_others_do(site: Site) -> None:
    ids = accept(10, 4, 11)
    hand.perform_all(site, work, ids)
    assert states(ids) == ["succeeded", "running", "succeeded"]
    assert outcomes(ids[1]) == []


@pytest.fixture
def refusal() -> Iterator[None]:
    """Let PostgreSQL refuse one result."""
    db.run(
        text(
            """
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN RAISE EXCEPTION 'refused'; END $$
            """
        )
    )
    db.run(
        text(
            "CREATE TRIGGER refusal BEFORE UPDATE ON tasks FOR EACH ROW "
            "WHEN (NEW.result = '{\"number\": 13}') EXECUTE FUNCTION refuse()"
        )
    )
    yield
    db.run(text("DROP FUNCTION refuse CASCADE"))


@pytest.mark.usefixtures("refusal")
def test_an_outcome_that_postgresql_refuses_fails_its_own_task_only(site: Site) -> None:
    ids = accept(12, 13, 14)
    hand.perform_all(site, work, ids)
    assert states(ids) == ["succeeded", "failed", "succeeded"]
    assert "refused" in rows(ids)[1].error["message"]


@pytest.mark.parametrize("verb", ["claim_many", "finish_many"])
def test_an_answer_that_was_lost_costs_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    ids = accept(10, 11)
    reached, verbs = db.run, {"claim_many": statements._CLAIM_MANY}
    verbs["finish_many"] = statements._FINISH_MANY
    lost = []

    def run(statement: Any) -> Any:
        found = reached(statement)
        if not lost and statement[0] is verbs[verb]:
            lost.append(statement)
            raise DatabaseUnavailable("The connection was lost.")
        return found

    monkeypatch.setattr(db, "run", run)
    hand.perform_all(site, work, ids)
    assert lost
    assert states(ids) == ["succeeded"] * 2
    assert [outcomes(task_id) for task_id in ids] == [["succeeded"]] * 2


def test_an_outcome_does_not_wait_for_the_rest_of_the_hand(site: Site) -> None:
    ids = accept(10, 5)
    hand.perform_all(site, work, ids)
    assert states(ids) == ["succeeded"] * 2, "the second waits for the first one's outcome"


# --- the keeper -----------------------------------------------------------------------------


def keeper_of(site: Site) -> Keeper:
    return Keeper(
        site.identity,
        site.reports,
        site.agents,
        slots=lambda: 2,
        consuming=lambda: True,
        broker_answers=lambda: True,
        each_beat=lambda: None,
    )


def taken(site: Site, numbers: tuple[int, ...]) -> dict[UUID, UUID]:
    claims = {task_id: new_id() for task_id in accept(*numbers)}
    assert len(hand._claim_all(site, work, claims)) == len(numbers)
    return claims


def test_a_process_that_dies_is_charged_to_the_task_that_ran(
    site: Site, relays_are_told: Any
) -> None:
    claims = taken(site, (10, 11, 12))
    done, ran, waits = claims.items()
    child = os.fork()
    if not child:
        site.reports.tell(Word.TAKEN, done, ran, waits)
        site.reports.tell(Word.BEGAN, done, limit_s=60)
        site.reports.tell(Word.DONE, done)
        site.reports.tell(Word.BEGAN, ran, limit_s=60)
        os._exit(9)
    os.waitpid(child, 0)
    watch = keeper_of(site)
    watch._take_reports()
    assert watch._count(Word.BEGAN) == 1
    watch._take_back_crashed()
    assert relays_are_told()
    found = db.run(text("SELECT state, crashes FROM tasks ORDER BY params"))
    assert [tuple(row) for row in found] == [("queued", 0), ("queued", 1), ("queued", 0)]
    assert not watch._running


def test_a_process_that_dies_between_a_claim_and_its_word_costs_no_lease(site: Site) -> None:
    ids = accept(10, 11)
    child = os.fork()
    if not child:
        claims = {task_id: new_id() for task_id in ids}
        site.reports.tell(Word.CLAIMING, *claims.items())
        hand._claim_all(site, work, {ids[0]: claims[ids[0]]})
        os._exit(9)
    os.waitpid(child, 0)
    assert states(ids) == ["running", "queued"]
    watch = keeper_of(site)
    watch._take_reports()
    watch._extend(0.0)
    watch._take_back_crashed()
    found = db.run(text("SELECT state, crashes, attempt FROM tasks ORDER BY params"))
    assert [tuple(row) for row in found] == [("queued", 0, 1), ("queued", 0, 0)]
    assert not watch._running


@pytest.mark.parametrize("together", [True, False])
def test_an_exit_amid_a_claim_costs_no_lease_and_charges_nobody(
    site: Site, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    ids = accept(10, 11)[: 1 + together]
    run = db.run

    def run_and_exit(statement: Any) -> Any:
        run(statement)
        raise SystemExit

    child = os.fork()
    if not child:
        monkeypatch.setattr(db, "run", run_and_exit)
        try:
            if together:
                hand.perform_all(site, work, ids)
            else:
                worker.perform(site, work, ids[0])
        finally:
            os._exit(9)
    os.waitpid(child, 0)
    assert set(states(ids)) == {"running"}
    watch = keeper_of(site)
    watch._take_reports()
    watch._take_back_crashed()
    assert set(states(ids)) == {"queued"}
    assert all(outcomes(task_id) == ["lost"] for task_id in ids)
    assert db.run(text("SELECT max(crashes) FROM tasks"))[0][0] == 0


@pytest.mark.parametrize("locked", [False, True])
def test_a_keeper_that_stops_puts_back_what_its_pool_has_left(site: Site, locked: bool) -> None:
    with db.transaction() as connection:
        connection.execute(statements.enlist({**site.identity.row, "slots": 2}))
    watch = keeper_of(site)
    watch._stop_requested.set()
    watch.start()
    watch.join()
    [task_id] = accept(10)
    child = os.fork()
    if not child:
        claim = new_id()
        site.reports.tell(Word.CLAIMING, (task_id, claim))
        hand._claim_all(site, work, {task_id: claim})
        os._exit(9)
    os.waitpid(child, 0)
    with db.transaction() as somebody:
        if locked:
            somebody.execute(statements.lock([task_id]))
        watch.stop()
    assert states([task_id]) == ["running" if locked else "queued"]
    stopped = "SELECT stopped_at IS NOT NULL FROM workers"
    assert db.run(text(stopped))[0][0], "whatever else could not be done"


def test_what_waits_too_long_for_its_turn_is_put_back_by_the_keeper(site: Site) -> None:
    claims = taken(site, (10, 11))
    ran, waits = claims.items()
    site.reports.tell(Word.TAKEN, ran, waits)
    site.reports.tell(Word.BEGAN, ran, limit_s=60)
    watch = keeper_of(site)
    watch._take_reports()
    watch._release_waiting(watch._running[waits[1].bytes].last.at + keeper.TAKEN_S - 0.1)
    assert states(list(claims)) == ["running", "running"]
    watch._release_waiting(watch._running[waits[1].bytes].last.at + keeper.TAKEN_S + 0.1)
    assert states(list(claims)) == ["running", "queued"]
    assert outcomes(waits[0]) == ["released"]


def test_leases_of_all_are_extended_and_one_that_is_being_ended_holds_up_none(site: Site) -> None:
    claims = taken(site, (10, 11))
    first, second = claims.items()
    db.run(text("UPDATE tasks SET lease_expires_at = now()"))
    with db.transaction() as ending:
        ending.execute(statements.lock([first[0]]))
        with db.transaction() as connection:
            kept = connection.execute(*statements.extend([first, second])).all()
        assert {row.claim_id for row in kept} == {first[1], second[1]}
    left = text("SELECT lease_expires_at > now() + interval '20 s' FROM tasks ORDER BY params")
    assert [row[0] for row in db.run(left)] == [False, True]


def test_a_claim_that_is_recorded_but_not_yet_told_costs_the_process_nothing(site: Site) -> None:
    claims = taken(site, (10, 11))
    done, ran = claims.items()
    site.reports.tell(Word.TAKEN, done)
    site.reports.tell(Word.DONE, done)
    site.reports.tell(Word.BEGAN, ran, limit_s=60)
    watch = keeper_of(site)
    watch._take_reports()
    db.run(text("UPDATE tasks SET state = 'succeeded', finished_at = now() WHERE params = :first"
                ).bindparams(first='{"number": 10}'))  # fmt: skip
    for _ in range(2):
        watch._extend(0.0)  # else it would end this process
    assert set(watch._running) == {ran[1].bytes}
