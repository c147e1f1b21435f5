"""The life of a task, statement by statement, on a real PostgreSQL."""

import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel
from sqlalchemy import text, update

from sutazai import admission, db, lifecycle, statements
from sutazai.agent import RETENTION, Action, Agent, Context, NoParams
from sutazai.errors import UnknownAction
from sutazai.keeper import Identity
from sutazai.models import new_id, tasks
from sutazai.state import Outcome, State
from sutazai.submission import Options, Submission

pytestmark = pytest.mark.usefixtures("database")

agent = Agent("tester", port=9999, doc="Tests.")


class Number(BaseModel):
    number: int = 0


@agent.action(time_limit_s=5, max_attempts=3)
def work(params: Number, context: Context) -> Number:
    """Work."""
    return params


@agent.action(rerun_after_crash=False)
def once(params: NoParams, context: Context) -> Number:
    """Run at most once."""
    return Number()


HERE = {"agent": "tester", "action": "work", "worker": "tester@here", "host": "here"}


def accept(action: Action[Any, Any] = work, **options: Any) -> UUID:
    submission = Submission(action, {}, Options(**options))
    with db.transaction() as connection:
        assert admission.accept(connection, submission, rung=False).fresh
    return submission.task_id


def claim(
    task_id: UUID, worker_id: UUID | None = None, host: str = "here", action: str = "work"
) -> Any:
    claim_id = uuid4()
    with db.transaction() as connection:
        row = connection.execute(
            *statements.claim(
                task_id,
                agent="tester",
                action=action,
                claim_id=claim_id,
                worker="tester@here",
                worker_id=worker_id or new_id(),
                host=host,
            )
        ).first()
    return (claim_id, row) if row else None


def held(task_id: UUID, claim_id: UUID) -> lifecycle.Claim:
    row = read(task_id)
    return lifecycle.Claim(task_id, claim_id, row.agent, row.parent_id, row.concurrency_key)


def finish(
    task_id: UUID, claim_id: UUID, state: State = State.SUCCEEDED, number: int = 1
) -> list[lifecycle.Ended] | None:
    outcome = Outcome.SUCCEEDED if state is State.SUCCEEDED else Outcome.FAILED
    known = held(task_id, claim_id)
    with db.transaction() as connection:
        return lifecycle.end(connection, known, state, outcome, result={"number": number})


def read(task_id: UUID) -> Any:
    with db.transaction() as connection:
        return connection.execute(tasks.select().where(tasks.c.task_id == task_id)).one()


def outcomes(task_id: UUID) -> list[str]:
    with db.transaction() as connection:
        row = connection.execute(statements.task(task_id)).one()
    return [attempt["outcome"] for attempt in row.attempts or []]


def expire_lease(task_id: UUID) -> None:
    with db.transaction() as connection:
        connection.execute(
            update(tasks)
            .where(tasks.c.task_id == task_id)
            .values(lease_expires_at=text("now() - interval '1 second'"))
        )


def delegate(task_id: UUID, claim_id: UUID, child_id: UUID) -> list[lifecycle.Ended] | None:
    known = held(task_id, claim_id)
    with db.transaction() as connection:
        return lifecycle.delegate(connection, known, child_id)


def rescue() -> lifecycle.Rescued:
    with db.transaction() as connection:
        return lifecycle.rescue(connection, statements.lease_expired(100))


def test_accept_claim_finish() -> None:
    task_id = accept()
    claim_id, row = claim(task_id)
    assert (row.attempt, row.action, row.max_attempts) == (1, "work", 3)
    assert finish(task_id, claim_id)
    ended = read(task_id)
    assert ended.state == "succeeded"
    assert ended.result == {"number": 1}
    assert ended.wait_seconds >= 0
    assert ended.run_seconds >= 0
    assert ended.lease_expires_at is None
    assert outcomes(task_id) == ["succeeded"]


def test_a_task_is_claimed_once() -> None:
    task_id = accept()
    assert claim(task_id)
    assert claim(task_id) is None


def test_many_claims_at_once_give_one_attempt() -> None:
    task_id = accept()
    claims: list[Any] = []
    threads = [threading.Thread(target=lambda: claims.append(claim(task_id))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([found for found in claims if found]) == 1
    assert read(task_id).attempt == 1


@pytest.mark.parametrize(
    "change",
    [
        {"run_at": datetime.now(UTC) + timedelta(hours=1)},
        {"deadline_at": datetime.now(UTC) - timedelta(hours=1)},
    ],
    ids=["not yet due", "too late"],
)
def test_what_is_not_due_is_not_claimed(change: dict[str, Any]) -> None:
    assert claim(accept(**change)) is None


def test_a_task_of_another_host_or_agent_is_not_claimed() -> None:
    submission = Submission(work, {}, host="elsewhere")
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=False)
    assert claim(submission.task_id, host="here") is None
    assert claim(submission.task_id, host="elsewhere")


def test_nothing_is_claimed_from_a_paused_queue() -> None:
    task_id = accept()
    with db.transaction() as connection:
        connection.execute(text("INSERT INTO queues VALUES ('tester', true)"))
    assert claim(task_id) is None


def test_a_stale_attempt_never_overwrites() -> None:
    task_id = accept()
    stale, _ = claim(task_id)
    expire_lease(task_id)
    assert rescue().tasks == 1
    current, row = claim(task_id)
    assert row.attempt == 2
    assert not finish(task_id, stale, State.FAILED)
    lines = [{"event": "late"}]
    for late in (
        statements.progress(task_id, stale, 0.5, "late"),
        statements.tell_lines(task_id, stale, lines),
        statements.extend([(task_id, stale)]),
        statements.requeue(task_id, stale, Outcome.RELEASED),
        statements.wait_for_child(task_id, stale, new_id()),
    ):
        assert not db.run(late)
    assert (read(task_id).progress, read(task_id).state) == (None, "running")
    assert finish(task_id, current)
    assert read(task_id).state == "succeeded"
    assert outcomes(task_id) == ["lost", "succeeded"]


def test_a_live_lease_is_not_rescued_and_extending_keeps_it() -> None:
    task_id = accept()
    claim_id, _ = claim(task_id)
    assert rescue().tasks == 0
    expire_lease(task_id)
    with db.transaction() as connection:
        kept = connection.execute(*statements.extend([(task_id, claim_id)])).all()
        foreign = connection.execute(*statements.extend([(task_id, uuid4())])).all()
    assert len(kept) == 1
    assert foreign == []
    assert rescue().tasks == 0


def test_the_third_crash_is_poison() -> None:
    task_id = accept()
    for crash in (1, 2):
        with db.transaction() as connection:
            connection.execute(
                update(tasks).where(tasks.c.task_id == task_id).values(run_at=text("now()"))
            )
        assert claim(task_id)
        expire_lease(task_id)
        rescue()
        assert (read(task_id).state, read(task_id).crashes) == ("queued", crash)
    with db.transaction() as connection:
        connection.execute(
            update(tasks).where(tasks.c.task_id == task_id).values(run_at=text("now()"))
        )
    assert claim(task_id)
    expire_lease(task_id)
    rescue()
    ended = read(task_id)
    assert (ended.state, ended.error["code"]) == ("failed", "poison")
    assert outcomes(task_id) == ["lost", "lost", "lost"]


def test_neighbours_of_a_crash_are_not_charged() -> None:
    worker_id = new_id()
    together = [accept(), accept()]
    for task_id in together:
        claim(task_id, worker_id)
        expire_lease(task_id)
    assert rescue().tasks == 2
    assert [read(task_id).crashes for task_id in together] == [0, 0]


def test_what_takes_its_worker_down_beside_a_neighbour_is_found_and_ends_as_poison() -> None:
    guilty, neighbour = accept(), accept()
    deaths = 0
    while read(guilty).state == "queued":
        deaths += 1
        worker_id = new_id()
        db.run(update(tasks).where(tasks.c.state == "queued").values(run_at=text("now()")))
        for task_id in (guilty, neighbour):
            claim(task_id, worker_id)
            expire_lease(task_id)
        rescue()
    assert deaths == 4, "the first one is charged to nobody"
    assert (read(guilty).error["code"], read(guilty).crashes) == ("poison", 3)
    assert (read(neighbour).state, read(neighbour).crashes) == ("queued", 0)


@pytest.mark.parametrize(("suspect", "guilty"), [((0,), 1), ((0, 1), 0), ((1,), 0)])
def test_a_suspect_that_waits_to_be_alone_keeps_no_charge_from_what_runs(
    suspect: tuple[int, ...], guilty: int
) -> None:
    """Suspects that are claimed at the same instant wait for the oldest of them."""
    worker_id = new_id()
    together = [accept(), accept()]
    for task_id in together:
        claim(task_id, worker_id)
        expire_lease(task_id)
    chosen = [together[number] for number in suspect]
    db.run(update(tasks).where(tasks.c.task_id.in_(chosen)).values(alone=True))
    rescue()
    assert [read(task_id).crashes for task_id in together] == [
        int(number == guilty) for number in (0, 1)
    ]


def test_what_a_suspect_kept_from_being_claimed_waits_for_no_second_notice() -> None:
    worker_id, limits = new_id(), lifecycle.KeyLimits(1, None)
    suspect, behind = accept(), accept()
    db.run(update(tasks).where(tasks.c.task_id == suspect).values(alone=True))
    claim_id, _ = claim(suspect, worker_id)
    assert claim(behind, worker_id) is None
    claimant = {**HERE, "worker_id": worker_id, "claim_id": uuid4()}
    with db.transaction() as connection:
        assert lifecycle.claim(connection, behind, limits, **claimant) is None
    assert finish(suspect, claim_id)  # after the one statement, and before the other
    with db.transaction() as connection:
        assert lifecycle.claim(connection, behind, limits, **claimant)
    assert read(behind).state == "running"


def test_what_must_not_run_twice_is_failed() -> None:
    task_id = accept(once)
    claim(task_id, action="once")
    expire_lease(task_id)
    rescue()
    assert read(task_id).error["code"] == "worker_lost"


def test_draining_charges_nothing() -> None:
    task_id = accept()
    claim_id, _ = claim(task_id)
    known = held(task_id, claim_id)
    with db.transaction() as connection:
        assert lifecycle.requeue(connection, known, Outcome.RELEASED) == []
    row = read(task_id)
    assert (row.state, row.failures, row.crashes, row.rings) == ("queued", 0, 0, 0)
    assert not row.alone
    assert claim(task_id)[1].attempt == 2


def test_cancelling_a_queued_task_ends_it_and_a_running_one_is_asked() -> None:
    queued, running = accept(), accept()
    claim_id, _ = claim(running)
    with db.transaction() as connection:
        assert [gone.task_id for gone in lifecycle.cancel(connection, queued)] == [queued]
        assert lifecycle.cancel(connection, running) == []
        assert connection.execute(statements.cancellation(running, claim_id)).scalar()
    assert read(queued).state == "cancelled"
    assert claim(queued) is None


def test_a_cancelled_running_task_whose_worker_dies_is_cancelled() -> None:
    task_id = accept()
    claim(task_id)
    with db.transaction() as connection:
        lifecycle.cancel(connection, task_id)
    expire_lease(task_id)
    rescue()
    assert (read(task_id).state, read(task_id).finished_at is None) == ("cancelled", False)


def test_deadlines() -> None:
    task_id = accept(deadline_at=datetime.now(UTC) - timedelta(seconds=1))
    with db.transaction() as connection:
        assert [gone.task_id for gone in lifecycle.expire(connection)] == [task_id]
    assert read(task_id).error["code"] == "deadline_exceeded"


def test_a_queued_task_of_an_unknown_action_fails_and_no_other_does() -> None:
    parent, running, _ = _family()
    child = read(running)
    with db.transaction() as connection:
        connection.execute(tasks.update().values(state="queued").where(tasks.c.task_id == running))

    def refuse(agent: str, action: str) -> list[UUID]:
        why = UnknownAction("There is no such action.")
        with db.transaction() as connection:
            ended = lifecycle.refuse(connection, child.task_id, agent, action, why)
        return [each.task_id for each in ended]

    assert refuse("other", child.action) == []
    assert refuse("tester", "other") == []
    assert refuse("tester", child.action) == [child.task_id, parent]
    assert refuse("tester", child.action) == []
    assert (read(parent).state, read(parent).error["code"]) == ("failed", "unknown_action")


def _family() -> tuple[UUID, UUID, UUID]:
    """Return a parent that waits for its running child, and the child's claim."""
    parent = accept()
    parent_claim, _ = claim(parent)
    child = Submission(work, {}, parent_id=parent, call_index=1)
    with db.transaction() as connection:
        admission.accept(connection, child, rung=False)
    child_claim, _ = claim(child.task_id)
    assert delegate(parent, parent_claim, child.task_id) == []
    return parent, child.task_id, child_claim


def test_children_whose_notices_died_with_their_parents_process_are_rung_at_once() -> None:
    parent = accept()
    claim(parent)
    children = [Submission(work, {}, parent_id=parent, call_index=call) for call in (1, 2)]
    with db.transaction() as connection:
        for child in children:
            admission.accept(connection, child, rung=True)
    queued, running = (child.task_id for child in children)
    claim(running)
    assert _rung(statements.ring_overdue("tester", 10)) == []
    expire_lease(parent)
    assert rescue().tasks == 1
    assert set(_rung(statements.ring_overdue("tester", 10))) == {queued}


def test_a_waiting_parent_ends_as_its_child_does() -> None:
    parent, child, claim_id = _family()
    assert read(parent).state == "waiting"
    ended = finish(child, claim_id, number=7)
    assert [each.task_id for each in ended or []] == [child, parent]
    assert (read(parent).state, read(parent).result) == ("succeeded", {"number": 7})


def test_a_child_that_ended_before_its_parent_waits_wakes_it_too() -> None:
    parent = accept()
    parent_claim, _ = claim(parent)
    child = Submission(work, {}, parent_id=parent, call_index=1)
    with db.transaction() as connection:
        admission.accept(connection, child, rung=False)
    child_claim, _ = claim(child.task_id)
    assert finish(child.task_id, child_claim)
    delegate(parent, parent_claim, child.task_id)
    assert read(parent).state == "succeeded"


def test_cancelling_a_waiting_task_cancels_its_child() -> None:
    parent, child, _ = _family()
    with db.transaction() as connection:
        lifecycle.cancel(connection, parent)
    assert read(child).cancel_requested_at is not None
    expire_lease(child)
    rescue()
    assert [read(parent).state, read(child).state] == ["cancelled", "cancelled"]


def test_a_late_task_that_somebody_works_on_holds_up_no_other() -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    locked, parent = accept(deadline_at=past), accept()
    child = Submission(work, {}, Options(deadline_at=past), parent_id=parent, call_index=1)
    free = accept(deadline_at=past)
    with db.transaction() as connection:
        admission.accept(connection, child, rung=False)
    with db.transaction() as other:
        other.execute(statements.lock([locked, parent]))
        with db.transaction() as connection:
            assert [gone.task_id for gone in lifecycle.expire(connection)] == [free]
    with db.transaction() as connection:
        gone = {each.task_id for each in lifecycle.expire(connection)}
    assert gone == {locked, child.task_id}


def test_the_same_call_of_a_parent_makes_one_child() -> None:
    parent = accept()
    accepted = []
    for _ in range(2):
        with db.transaction() as connection:
            child = Submission(work, {}, parent_id=parent, call_index=1)
            accepted.append(admission.accept(connection, child, rung=False).fresh)
    assert accepted == [True, False]


def test_the_same_tick_makes_one_task_a_host() -> None:
    tick_at = datetime(2026, 1, 1, tzinfo=UTC)
    accepted = []
    for host in ("a", "a", "b", None, None):
        submission = Submission(work, {}, scheduled_by="s", tick_at=tick_at, host=host)
        with db.transaction() as connection:
            accepted.append(admission.accept(connection, submission, rung=False).fresh)
    assert accepted == [True, False, True, True, False]


def _rung(statement: Any) -> list[UUID]:
    with db.transaction() as connection:
        return [row.task_id for row in connection.execute(statement)]


def test_ringing_takes_priority_then_age_and_each_row_once() -> None:
    low, first, second = accept(priority=1), accept(), accept()
    assert set(_rung(statements.ring_unrung("tester", 2))) == {first, second}
    assert _rung(statements.ring_unrung("tester", 2)) == [low]
    assert _rung(statements.ring_unrung("tester", 2)) == []
    assert _rung(statements.ring_overdue("tester", 10)) == []


def test_a_row_whose_notice_was_lost_is_rung_again_with_growing_delays() -> None:
    task_id = accept()
    _rung(statements.ring_unrung("tester", 1))
    delays = []
    for _ in range(8):
        row = read(task_id)
        with db.transaction() as connection:
            now = connection.execute(text("SELECT now()")).scalar_one()
            delays.append((row.next_ring_at - now).total_seconds())
            connection.execute(
                update(tasks)
                .where(tasks.c.task_id == task_id)
                .values(next_ring_at=text("now() - interval '1 hour'"))
            )
        assert _rung(statements.ring_overdue("tester", 10)) == [task_id]
    assert delays == pytest.approx([15, 30, 60, 120, 240, 480, 600, 600], abs=1)


def test_while_the_queue_is_empty_back_off_does_not_count() -> None:
    task_id = accept()
    _rung(statements.ring_unrung("tester", 1))
    with db.transaction() as connection:
        # Rung twice; the last time 16 s ago, so the next is due in 14 s.
        connection.execute(
            update(tasks)
            .where(tasks.c.task_id == task_id)
            .values(rings=2, next_ring_at=text("now() + interval '14 seconds'"))
        )
    assert _rung(statements.ring_overdue("tester", 10)) == []
    assert _rung(statements.ring_overdue("tester", 10, empty=[5])) == [task_id]


def test_back_off_counts_for_a_host_whose_worker_is_dead() -> None:
    for host in ("here", "there", None):
        with db.transaction() as connection:
            admission.accept(connection, Submission(work, {}, host=host), rung=True)
    row = Identity("tester@here", "tester", "here").row
    db.run(statements.enlist({**row, "slots": 1}))
    in_14_s = text("now() + interval '14 seconds'")
    db.run(update(tasks).values(rings=2, next_ring_at=in_14_s))
    rung = set(_rung(statements.ring_overdue("tester", 10, empty=[5])))
    assert {read(task_id).host for task_id in rung} == {"here", None}


def test_what_only_a_dead_host_could_run_makes_no_agent_unhealthy() -> None:
    row = Identity("tester@here", "tester", "here").row
    db.run(statements.enlist({**row, "slots": 1}))

    def oldest_age_s() -> float | None:
        found = db.run(statements.status(["tester"]))[0].oldest_age_s
        return None if found is None else float(found)

    for host, expected in (("there", None), ("here", 50), (None, 100)):
        with db.transaction() as connection:
            submission = Submission(work, {}, host=host)
            admission.accept(connection, submission, rung=True)
        age = text(f"now() - interval '{expected or 200} seconds'")
        db.run(update(tasks).where(tasks.c.task_id == submission.task_id).values(run_at=age))
        assert oldest_age_s() == (expected and pytest.approx(expected, abs=5))
        if host == "here":
            db.run(tasks.delete().where(tasks.c.task_id == submission.task_id))


@pytest.mark.parametrize(
    ("take", "change"),
    [
        (lambda _: statements.ring_unrung("tester", 10), "rings = 0"),
        (
            lambda _: statements.ring_overdue("tester", 10),
            "rings = 1, next_ring_at = now() - interval '1 second'",
        ),
        (
            lambda _: statements.ring_again("tester"),
            "rings = 1, next_ring_at = now() + interval '1 minute'",
        ),
        (lambda _: statements.become_due(10), "next_ring_at = NULL"),
        (
            lambda ids: statements.claim_many(
                {task_id: uuid4() for task_id in ids}, worker_id=uuid4(), **HERE
            ),
            "rings = 1",
        ),
        (
            lambda _: statements.take_callbacks(10, 60.0),
            "callback_url = 'http://x', state = 'failed', finished_at = now()",
        ),
    ],
    ids=["unrung", "overdue", "again", "become due", "claim", "callbacks"],
)
def test_a_row_that_somebody_works_on_holds_up_no_other(
    take: Callable[[Sequence[UUID]], Any], change: str
) -> None:
    locked, free = accept(), accept()

    def versions() -> dict[UUID, str]:
        with db.transaction() as connection:
            rows = connection.execute(text("SELECT task_id, xmin::text FROM tasks"))
            return {row.task_id: row.xmin for row in rows}

    with db.transaction() as connection:
        connection.execute(text(f"UPDATE tasks SET {change}"))
    before = versions()
    with db.transaction() as somebody:
        somebody.execute(statements.lock([locked]))
        db.run(take([locked, free]))
    assert [task_id for task_id, version in versions().items() if version != before[task_id]] == [
        free
    ]


def test_a_failed_ring_is_repeated_after_a_second_without_doubling() -> None:
    task_id = accept()
    _rung(statements.ring_unrung("tester", 1))
    with db.transaction() as connection:
        connection.execute(statements.ring_failed([task_id]))
    row = read(task_id)
    assert row.rings == 0
    with db.transaction() as connection:
        now = connection.execute(text("SELECT now()")).scalar_one()
    assert 0 < (row.next_ring_at - now).total_seconds() <= 1


def test_rows_become_due_when_their_time_comes() -> None:
    task_id = accept(run_at=datetime.now(UTC) + timedelta(hours=1))
    assert read(task_id).next_ring_at is None
    with db.transaction() as connection:
        connection.execute(
            update(tasks).where(tasks.c.task_id == task_id).values(run_at=text("now()"))
        )
        connection.execute(statements.become_due(10))
    assert _rung(statements.ring_unrung("tester", 10)) == [task_id]


def test_old_tasks_are_pruned_with_their_attempts_and_live_families_are_kept() -> None:
    old, fresh = accept(), accept()
    parent, child, _ = _family()
    for task_id in (old, fresh):
        finish(task_id, claim(task_id)[0])
    with db.transaction() as connection:
        connection.execute(
            update(tasks)
            .where(tasks.c.task_id.in_([old, child]))
            .values(finished_at=text("now() - interval '40 days'"))
        )
        connection.execute(statements.prune({}, otherwise=RETENTION, limit=100))
        left = set(connection.execute(tasks.select().with_only_columns(tasks.c.task_id)).scalars())
    assert left == {fresh, parent, child}
    assert outcomes(fresh) == ["succeeded"]
