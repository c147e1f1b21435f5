"""What becomes a task, what repeats one, and what must wait, on a real PostgreSQL."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel
from sqlalchemy import text

from sutazai import admission, db, lifecycle, replay, statements, worker
from sutazai.admission import Accepted
from sutazai.agent import RETENTION, Action, Agent, Context, NoParams
from sutazai.errors import KeyBusy, KeyReused, QueueDraining, QueueFull, TaskFailed
from sutazai.keeper import Identity
from sutazai.models import new_id
from sutazai.reports import Reports
from sutazai.state import Outcome, State
from sutazai.submission import Options, Submission

pytestmark = pytest.mark.usefixtures("database")

agent = Agent("tester", port=9999, doc="Tests.")


class Number(BaseModel):
    number: int = 0


class Gauge:
    """How many attempts run at once, and how many did at most."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = self.runs = 0

    def enter(self) -> None:
        with self.lock:
            self.now += 1
            self.runs += 1
            self.most = max(self.most, self.now)

    def leave(self) -> None:
        with self.lock:
            self.now -= 1


gauge = Gauge()
gate = threading.Event()


@agent.action()
def work(params: Number, context: Context) -> Number:
    """Work."""
    return params


@agent.action(key_slots=2)
def pair(params: Number, context: Context) -> Number:
    """Run two at once of one key."""
    gauge.enter()
    time.sleep(0.02)  # long enough for another to begin
    gauge.leave()
    return params


@agent.action(key_slots=100, key_rate_per_s=5)
def slow(params: Number, context: Context) -> Number:
    """Start five a second of one key."""
    return params


@agent.action()
def hang(params: NoParams, context: Context) -> Number:
    """Wait for the test."""
    gauge.enter()
    gate.wait(20)
    gauge.leave()
    return Number()


def accept(action: Action[Any, Any] = work, number: int = 0, **options: Any) -> Accepted:
    params = {"number": number} if number else {}
    submission = Submission(action, params, Options(**options))
    with db.transaction() as connection:
        return admission.accept(connection, submission, rung=False)


def query(sql: str, **values: Any) -> Any:
    with db.transaction() as connection:
        return connection.execute(text(sql), values)


def scalar(sql: str, **values: Any) -> Any:
    with db.transaction() as connection:
        return connection.execute(text(sql), values).scalar()


def site(identity: Identity | None = None) -> worker.Site:
    nothing: Any = None
    identity = identity or Identity("tester@here", "tester", "here")
    return worker.Site(identity, Reports(), {"tester": agent}, nothing, nothing)


def perform(place: worker.Site, task_id: UUID, action: Action[Any, Any]) -> bool:
    """Try to run a task; return whether it was claimed."""
    try:
        with suppress(worker.Requeued, TaskFailed):
            worker.perform(place, action, task_id)
    except worker.NotClaimed:
        return False
    return True


# --- idempotency keys -----------------------------------------------------------------------


def test_a_key_is_one_task() -> None:
    first = accept(idempotency_key="k")
    again = accept(idempotency_key="k")
    assert (first.fresh, again.fresh) == (True, False)
    assert first.task_id == again.task_id
    assert scalar("SELECT count(*) FROM tasks") == 1


@pytest.mark.parametrize(
    "conflict",
    [{}] + [{"concurrency_key": "c", "on_conflict": how} for how in ("reject", "join", "replace")],
)
def test_a_hundred_equal_requests_at_once_are_one_task(conflict: dict[str, Any]) -> None:
    begin = threading.Barrier(8)

    def ask(_: int) -> Accepted:
        with suppress(threading.BrokenBarrierError):
            begin.wait(1)
        return accept(idempotency_key="k", **conflict)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(100)))
    assert sum(answer.fresh for answer in answers) == 1
    assert len({answer.task_id for answer in answers}) == 1
    assert query("SELECT state FROM tasks").scalars().all() == ["queued"]


@pytest.mark.parametrize("how", ["reject", "join", "replace"])
def test_an_equal_request_that_waits_for_the_key_is_the_first_ones_task(how: str) -> None:
    options = {"idempotency_key": "k", "concurrency_key": "c", "on_conflict": how}
    first = Submission(work, {}, Options.model_validate(options))
    with ThreadPoolExecutor(1) as pool:
        with db.transaction() as connection:
            admission.accept(connection, first, rung=False)
            second = pool.submit(accept, **options)
            _until(lambda: scalar(_WAITING))
        assert second.result(20).task_id == first.task_id
    assert query("SELECT state FROM tasks").scalars().all() == ["queued"]


_WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"


@pytest.mark.parametrize("other", [{"number": 1}, {"priority": 6}, {"action": pair}])
def test_the_same_key_with_another_request_is_refused(other: dict[str, Any]) -> None:
    accept(idempotency_key="k")
    with pytest.raises(KeyReused, match="'k'"):
        accept(**other, idempotency_key="k")
    assert scalar("SELECT count(*) FROM tasks") == 1


def test_keys_of_two_agents_are_two() -> None:
    other = Agent("other", port=9998, doc="Tests.")
    first = accept(idempotency_key="k")
    second = accept(other.get("describe"), idempotency_key="k")
    assert second.fresh
    assert second.task_id != first.task_id


def test_a_key_lasts_seven_days_beyond_the_end_of_its_task() -> None:
    first = accept(idempotency_key="k")
    query("UPDATE tasks SET created_at = now() - interval '30 days'")
    assert not accept(idempotency_key="k").fresh, "the task has not ended"
    ended = "UPDATE tasks SET state = 'succeeded', finished_at = now() - interval '{} days'"
    query(ended.format(6))
    assert not accept(idempotency_key="k").fresh
    query(ended.format(8))
    again = accept(idempotency_key="k")
    assert again.fresh
    assert again.task_id != first.task_id


def test_the_same_submission_twice_is_one_task() -> None:
    submission = Submission(work, {})
    for fresh in (True, False):
        with db.transaction() as connection:
            accepted = admission.accept(connection, submission, rung=False)
        assert accepted == Accepted(submission.task_id, fresh=fresh)


# --- admission ------------------------------------------------------------------------------


def test_a_full_queue_refuses_new_tasks_and_still_knows_old_ones() -> None:
    accept(idempotency_key="k")
    for limit, refused in ((1, True), (2, False)):
        submission = Submission(work, {})
        with db.transaction() as connection:
            if refused:
                with pytest.raises(QueueFull):
                    admission.accept(connection, submission, rung=False, limit=limit)
            else:
                assert admission.accept(connection, submission, rung=False, limit=limit).fresh
    with db.transaction() as connection:
        known = Submission(work, {}, Options(idempotency_key="k"))
        assert not admission.accept(connection, known, rung=False, limit=1).fresh


def accept_many(*submissions: Submission, limit: int | None = None) -> list[UUID]:
    with db.transaction() as connection:
        return admission.accept_many(connection, submissions, limit=limit)


def test_a_batch_is_refused_where_it_does_not_fit_as_a_whole() -> None:
    accept()
    batch = [Submission(work, {}) for _ in range(3)]
    tomorrow = Options(run_at=datetime.now(UTC) + timedelta(days=1))
    later = [Submission(work, {}, tomorrow) for _ in range(3)]
    careful = [
        Submission(work, {}, Options(concurrency_key=key, on_conflict="join"))
        for key in ("a", "b", "a")
    ]
    with pytest.raises(QueueFull, match="may hold 3 due tasks, and has no room for 3 more"):
        accept_many(*batch, limit=3)
    with pytest.raises(QueueFull):
        accept_many(*batch[1:], *careful, limit=4)
    assert scalar("SELECT count(*) FROM tasks") == 1
    assert len(accept_many(*batch[:1], *later[1:], limit=2)) == 3
    with pytest.raises(QueueFull):
        accept_many(later[0], limit=2)
    assert len(set(accept_many(*batch[1:], *careful, limit=6))) == 4
    assert scalar("SELECT count(*) FROM tasks WHERE run_at <= now()") == 6


def test_a_batch_that_was_accepted_is_known_also_by_a_queue_that_takes_nothing() -> None:
    keyed = [Submission(work, {}, Options(idempotency_key=key)) for key in ("a", "b")]
    ids = accept_many(*keyed, limit=2)
    again = [Submission(work, {}, Options(idempotency_key=key)) for key in ("a", "b")]
    assert accept_many(*again, limit=2) == ids
    with db.transaction() as connection:
        connection.execute(statements.set_queue("tester", draining=True))
    assert accept_many(*again) == ids
    with pytest.raises(QueueDraining):
        accept_many(*again, Submission(work, {}))


def test_a_draining_queue_takes_children_only() -> None:
    parent = accept().task_id
    with db.transaction() as connection:
        connection.execute(statements.set_queue("tester", draining=True))
    for options in ({}, {"idempotency_key": "k"}):
        with pytest.raises(QueueDraining):
            accept(**options)
    # As a front does it, in one statement, between its check and the change.
    assert not db.run(statements.accept(Submission(work, {}).row, rung=False))
    keyed = Submission(work, {}, Options(idempotency_key="k"))
    assert not db.run(statements.accept(keyed.row, rung=False))
    child = Submission(work, {}, parent_id=parent, call_index=1)
    with db.transaction() as connection:
        assert admission.accept(connection, child, rung=False).fresh
        connection.execute(statements.set_queue("tester", draining=False))
    assert accept(idempotency_key="k").fresh, "a refused request stores nothing"


def test_a_paused_queue_starts_nothing() -> None:
    task_id = accept().task_id
    with db.transaction() as connection:
        connection.execute(statements.set_queue("tester", paused=True))
    assert not perform(site(), task_id, work)
    with db.transaction() as connection:
        connection.execute(statements.set_queue("tester", paused=False))
    assert perform(site(), task_id, work)


def test_a_batch_is_in_order_and_knows_its_keys() -> None:
    known = accept(number=7, idempotency_key="known").task_id
    submissions = [
        Submission(
            work,
            {"number": index} if index != 1500 else {"number": 7},
            Options(
                idempotency_key="known" if index == 1500 else f"k{index}" if index % 2 else None
            ),
        )
        for index in range(1, 2501)
    ]
    with db.transaction() as connection:
        ids = admission.accept_many(connection, submissions)
    wanted = [submission.task_id for submission in submissions]
    wanted[1499] = known
    assert ids == wanted
    assert scalar("SELECT count(*) FROM tasks") == 2500
    with db.transaction() as connection:
        again = admission.accept_many(connection, [submissions[0], submissions[2]])
    assert again == [ids[0], ids[2]]


def test_one_key_twice_in_a_batch_is_one_task() -> None:
    def submission(number: int, key: str | None) -> Submission:
        return Submission(work, {"number": number}, Options(idempotency_key=key))

    known = accept(number=3, idempotency_key="c").task_id
    made = [submission(*each) for each in ((1, "a"), (2, "b"), (1, "a"), (3, "c"), (3, "c"))]
    with db.transaction() as connection:
        ids = admission.accept_many(connection, made)
    assert ids == [made[0].task_id, made[1].task_id, made[0].task_id, known, known]
    assert scalar("SELECT count(*) FROM tasks") == 3
    other = [submission(1, "d"), submission(2, "d")]
    with pytest.raises(KeyReused), db.transaction() as connection:
        admission.accept_many(connection, other)
    assert scalar("SELECT count(*) FROM idempotency_keys") == 3


def test_an_expired_key_of_a_batch_is_taken_anew() -> None:
    old = accept(number=1, idempotency_key="k").task_id
    query("UPDATE tasks SET state = 'succeeded', finished_at = now() - interval '8 days'")
    submission = Submission(work, {"number": 2}, Options(idempotency_key="k"))
    with db.transaction() as connection:
        assert admission.accept_many(connection, [submission]) == [submission.task_id]
    assert accept(number=2, idempotency_key="k").task_id == submission.task_id != old


@pytest.mark.parametrize("after", ["drained", "resumed"])
@pytest.mark.parametrize("way", ["accept", "accept_many"])
def test_nothing_is_accepted_by_a_queue_that_begins_to_drain_meanwhile(
    monkeypatch: pytest.MonkeyPatch, way: str, after: str
) -> None:
    def drain(draining: bool) -> None:
        with db.transaction() as connection:
            connection.execute(statements.set_queue("tester", draining=draining))

    insert = getattr(statements, way)

    def late(*args: Any, **values: Any) -> Any:
        drain(True)  # between the check and the insertion
        return insert(*args, **values)

    parent_of = statements.parent_of

    def later(task_id: UUID) -> Any:
        drain(after == "drained")
        return parent_of(task_id)

    monkeypatch.setattr(statements, way, late)
    monkeypatch.setattr(statements, "parent_of", later)
    hand_over: Any = {
        "accept": lambda connection, one: admission.accept(connection, one, rung=False),
        "accept_many": lambda connection, one: admission.accept_many(connection, [one]),
    }[way]
    with pytest.raises(QueueDraining), db.transaction() as connection:
        hand_over(connection, Submission(work, {}, Options()))
    assert scalar("SELECT count(*) FROM tasks") == 0


def test_a_batch_is_all_or_nothing() -> None:
    accept(number=1, idempotency_key="k")
    submissions = [
        Submission(work, {"number": number}, Options(idempotency_key=key))
        for number, key in ((1, None), (2, "other"), (3, "k"))
    ]
    with pytest.raises(KeyReused), db.transaction() as connection:
        admission.accept_many(connection, submissions)
    assert scalar("SELECT count(*) FROM tasks") == 1
    assert scalar("SELECT count(*) FROM idempotency_keys") == 1


def test_two_batches_that_share_keys_do_not_deadlock() -> None:
    keys = [f"k{index:03}" for index in range(200)]

    def send(reverse: bool) -> list[UUID]:
        ordered = list(reversed(keys)) if reverse else keys
        made = [Submission(work, {}, Options(idempotency_key=key)) for key in ordered]
        with db.transaction() as connection:
            ids = admission.accept_many(connection, made)
        return list(reversed(ids)) if reverse else ids

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(send, [False, True, False, True])
    assert all(ids == first for ids in others)
    assert scalar("SELECT count(*) FROM tasks") == len(keys)


# --- concurrency keys -----------------------------------------------------------------------


def test_a_key_never_runs_more_than_its_slots_and_all_of_it_runs() -> None:
    gauge.now = gauge.most = gauge.runs = 0
    ids = [accept(pair, concurrency_key="a").task_id for _ in range(120)]
    place = site()
    until = time.monotonic() + 60

    def drain(_: int) -> None:
        while time.monotonic() < until:
            with db.transaction() as connection:
                connection.execute(statements.become_due(10))
                due = connection.execute(
                    text(
                        "SELECT task_id FROM tasks WHERE state = 'queued' AND NOT held "
                        "ORDER BY random() LIMIT 4"
                    )
                ).scalars()
                chosen = list(due)
            if not chosen and not scalar("SELECT count(*) FROM tasks WHERE finished_at IS NULL"):
                return
            for task_id in chosen:
                perform(place, task_id, pair)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(drain, range(4)))
    assert gauge.runs == len(ids)
    assert gauge.most == 2
    assert scalar("SELECT count(*) FROM tasks WHERE state = 'succeeded'") == len(ids)


def test_a_held_task_is_not_rung_until_its_key_has_room() -> None:
    first, second, third = (accept(concurrency_key="a").task_id for _ in range(3))
    place = site()
    with db.transaction() as connection:
        claim_id = uuid4()
        claimed = lifecycle.claim(
            connection,
            first,
            lifecycle.KeyLimits(1, None),
            agent="tester",
            action="work",
            claim_id=claim_id,
            worker="w",
            worker_id=place.identity.worker_id,
            host="here",
        )
    assert claimed is not None
    for waiting in (second, third):
        assert not perform(place, waiting, work)
    with db.transaction() as connection:
        assert not connection.execute(statements.ring_unrung("tester", 10)).all()
        assert not connection.execute(statements.become_due(10)).rowcount
        assert not connection.execute(statements.wake_keys()).all()
        held = lifecycle.Claim(first, claim_id, "tester", None, "a")
        lifecycle.end(connection, held, State.SUCCEEDED, Outcome.SUCCEEDED)
    with db.transaction() as connection:
        rung = connection.execute(statements.ring_unrung("tester", 10)).all()
    assert [row.task_id for row in rung] == [second], "the older one, and only as many as fit"
    assert perform(place, second, work)
    with db.transaction() as connection:
        rung = connection.execute(statements.ring_unrung("tester", 10)).all()
    assert [row.task_id for row in rung] == [third]


def test_a_lost_waking_is_made_good_by_the_relay() -> None:
    first, second = (accept(concurrency_key="a").task_id for _ in range(2))
    assert perform(site(), first, work)
    query("UPDATE tasks SET held = true, next_ring_at = NULL WHERE task_id = :id", id=second)
    with db.transaction() as connection:
        woken = connection.execute(statements.wake_keys()).scalars().all()
    assert woken == [second]


def test_a_rate_admits_two_seconds_worth_and_then_waits() -> None:
    place = site()
    ids = [accept(slow, concurrency_key="a").task_id]
    began = time.monotonic()
    while perform(place, ids[-1], slow):
        ids.append(accept(slow, concurrency_key="a").task_id)
        assert len(ids) < 100
    elapsed_s = time.monotonic() - began
    assert 10 <= len(ids) - 1 <= 10 + 5 * elapsed_s + 1
    with db.transaction() as connection:
        held = connection.execute(text("SELECT task_id FROM tasks WHERE held")).scalars().all()
    assert held == ids[-1:]
    query("UPDATE concurrency_keys SET next_at = next_at - interval '10 seconds'")
    with db.transaction() as connection:
        woken = connection.execute(statements.wake_keys()).scalars().all()
    assert woken == held


def test_conflicts_are_resolved_as_asked() -> None:
    first = accept(concurrency_key="a", on_conflict="reject").task_id
    with pytest.raises(KeyBusy, match=str(first)):
        accept(concurrency_key="a", on_conflict="reject")
    assert accept(concurrency_key="a", on_conflict="join") == Accepted(first, fresh=False)
    assert accept(concurrency_key="b", on_conflict="reject").fresh
    replacing = accept(concurrency_key="a", on_conflict="replace")
    assert replacing.fresh
    assert [(gone.task_id, gone.state) for gone in replacing.replaced] == [(first, "cancelled")]
    second = accept(concurrency_key="a").task_id
    unfinished = "SELECT task_id FROM tasks WHERE finished_at IS NULL AND concurrency_key = 'a'"
    with db.transaction() as connection:
        found = set(connection.execute(text(unfinished)).scalars())
    assert found == {replacing.task_id, second}


@pytest.mark.parametrize("how", ["reject", "join", "replace"])
def test_the_same_submission_again_is_not_in_its_own_way(how: str) -> None:
    submission = Submission(
        work, {}, Options.model_validate({"concurrency_key": "k", "on_conflict": how})
    )
    for _ in range(2):  # the first answer was lost
        with db.transaction() as connection:
            found = admission.accept(connection, submission, rung=False)
        assert found.task_id == submission.task_id
    assert query("SELECT state FROM tasks").scalars().all() == ["queued"]


def test_a_key_that_joined_a_task_stands_for_it() -> None:
    joined = accept(concurrency_key="k").task_id
    wanted = {"concurrency_key": "k", "on_conflict": "join", "idempotency_key": "i"}
    assert accept(**wanted).task_id == joined
    query("UPDATE tasks SET state = 'succeeded', finished_at = now()")
    assert accept(**wanted).task_id == joined
    with pytest.raises(KeyReused):
        accept(number=7, **wanted)


def test_the_same_instant_in_another_time_zone_is_the_same_request() -> None:
    first, second = (
        accept(idempotency_key="k", run_at=instant).task_id
        for instant in ("2030-01-01T00:00:00Z", "2030-01-01T01:00:00+01:00")
    )
    assert first == second


def test_joining_at_once_makes_one_task() -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda _: accept(concurrency_key="a", on_conflict="join"), range(60))
        )
    assert sum(answer.fresh for answer in answers) == 1
    assert len({answer.task_id for answer in answers}) == 1


# --- a suspect ------------------------------------------------------------------------------


def test_a_task_whose_process_died_runs_alone() -> None:
    gate.clear()
    gauge.now = gauge.most = gauge.runs = 0
    identity = Identity("tester@here", "tester", "here")
    place = site(identity)
    neighbour, suspect, late = (accept(hang).task_id for _ in range(3))
    query("UPDATE tasks SET alone = true WHERE task_id = :id", id=suspect)
    query("UPDATE tasks SET rings = 1")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(perform, place, neighbour, hang)
        _until(lambda: gauge.now == 1)
        second = pool.submit(perform, place, suspect, hang)
        _until(lambda: scalar("SELECT state FROM tasks WHERE task_id=:id", id=suspect) == "running")
        assert not perform(place, late, hang), "nothing is started beside a suspect"
        assert gauge.runs == 1, "and a suspect waits for those that run"
        other = Identity("tester@there", "tester", "there")
        assert perform(site(other), accept(work).task_id, work), "other workers go on"
        gate.set()
        assert first.result(20)
        assert second.result(20)
    assert (gauge.runs, gauge.most) == (2, 1)
    assert scalar("SELECT next_ring_at <= now() FROM tasks WHERE task_id = :id", id=late)
    assert perform(place, late, hang)


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- replay and prune -----------------------------------------------------------------------


def fail(count: int, **options: Any) -> list[UUID]:
    ids = [accept(number=index + 1, **options).task_id for index in range(count)]
    query(
        "UPDATE tasks SET state = 'failed', finished_at = now(), next_ring_at = NULL, "
        """error = '{"code": "task_failed", "message": "x", "retryable": true}' """
        "WHERE task_id = ANY(:ids)",
        ids=ids,
    )
    return ids


def test_a_replay_is_spread_edited_and_not_repeated() -> None:
    failed = fail(5, priority=7, labels={"a": "b"})
    wanted = replay.Filter(rate_per_s=2, params={"number": 99}, labels={"a": "b"})

    def again() -> list[UUID]:
        with db.transaction() as connection:
            return replay.repeat_many(connection, wanted, {"tester": agent}, default_agent="tester")

    with ThreadPoolExecutor(2) as pool:
        made = sorted(pool.map(lambda _: again(), range(2)), key=len)
    assert (len(made[0]), len(made[1])) == (0, 5), "two at once make one copy"
    with db.transaction() as connection:
        rows = connection.execute(
            text(
                "SELECT retry_of, params, priority, labels, "
                "extract(epoch FROM run_at - min(run_at) OVER ()) AS after_s "
                "FROM tasks WHERE task_id = ANY(:ids) ORDER BY retry_of"
            ),
            {"ids": made[1]},
        ).all()
    assert [row.retry_of for row in rows] == failed
    assert all(row.params == {"number": 99} and row.priority == 7 for row in rows)
    assert [float(row.after_s) for row in rows] == pytest.approx([0, 0.5, 1, 1.5, 2], abs=0.01)


def test_a_replay_is_refused_where_it_does_not_fit() -> None:
    fail(3)
    small = Agent("tester", port=9999, doc="Tests.", queue_limit=2)
    small.actions["work"] = work
    waiting = accept()

    def again(rate_per_s: float) -> list[UUID]:
        wanted = replay.Filter(agent="tester", rate_per_s=rate_per_s)
        with db.transaction() as connection:
            return replay.repeat_many(connection, wanted, {"tester": small})

    second = accept()
    with pytest.raises(QueueFull):
        again(0.001)
    for task in (waiting, second):
        perform(site(), task.task_id, work)
    assert len(again(0.001)) == 3, "one is due, and the others in time"


def prune(limit: int = 10, **days: float) -> int:
    retention = {name: timedelta(days=kept) for name, kept in days.items()}
    found = db.run(statements.prune(retention, otherwise=RETENTION, limit=limit))
    return int(found[0][0])


def test_each_agents_tasks_are_kept_as_long_as_it_says() -> None:
    for name in ("brief", "gone", "long"):
        declared = Agent(name, port=9998, doc="Tests.")
        for _ in range(3):
            accept(declared.get("describe"))
    left = "SELECT agent, count(*) FROM tasks GROUP BY agent ORDER BY agent"
    query("UPDATE tasks SET state = 'failed', finished_at = now() - interval '10 days'")
    accept()
    assert prune(brief=1, long=60) == 3
    assert [tuple(row) for row in query(left)] == [("gone", 3), ("long", 3), ("tester", 1)]
    query("UPDATE tasks SET finished_at = now() - interval '40 days' WHERE state = 'failed'")
    assert [prune(2, brief=1, long=60) for _ in range(3)] == [2, 1, 0], "in chunks"
    assert [tuple(row) for row in query(left)] == [("long", 3), ("tester", 1)]
    assert prune(1, long=30) + prune(10, long=30) == 3
    assert scalar("SELECT sum(tasks) FROM totals") == 9


def test_pruning_takes_all_that_is_the_tasks_and_keeps_the_totals() -> None:
    ended = accept(idempotency_key="old").task_id
    assert perform(site(), ended, work)
    kept = accept(idempotency_key="new").task_id
    query("UPDATE tasks SET finished_at = now() - interval '40 days' WHERE task_id=:id", id=ended)
    query("INSERT INTO task_events VALUES (:id, 1, 'log', '{}')", id=ended)
    for expected in (1, 0):
        assert prune() == expected
    for table in ("attempts", "task_events"):
        assert scalar(f"SELECT count(*) FROM {table}") == 0
    assert scalar("SELECT key FROM idempotency_keys") == "new"
    assert scalar("SELECT task_id FROM tasks") == kept
    with db.transaction() as connection:
        totals = [tuple(row) for row in connection.execute(text("SELECT * FROM totals"))]
    assert totals == [("tester", "work", "succeeded", 1)]


def test_activity_counts_what_has_ended_lately() -> None:
    fail(2)
    assert perform(site(), accept().task_id, work)
    query(
        "UPDATE tasks SET finished_at = now() - interval '2 min' WHERE params = '{\"number\": 2}'"
    )
    found = db.run(statements.activity(["tester", "other"], 60.0))
    assert [tuple(row) for row in found] == [("tester", 1, 1), ("other", 0, 0)]


def test_the_key_of_a_run_of_a_schedule_lasts_as_long_as_any() -> None:
    task_id = accept(idempotency_key="run").task_id
    query("UPDATE tasks SET scheduled_by = 's', state = 'failed'")
    query("UPDATE tasks SET finished_at = now() - interval '2 days'")
    prune_ticks = statements.prune_ticks(after=timedelta(days=1), limit=10)
    assert db.run(prune_ticks)[0][0] == 0
    query("UPDATE tasks SET tick_at = now()")
    assert prune() == 0
    assert db.run(prune_ticks)[0][0] == 1
    assert accept(idempotency_key="run").task_id != task_id


def test_concurrency_keys_that_nobody_needs_are_pruned() -> None:
    accept(concurrency_key="busy", on_conflict="join")
    busy = Submission(work, {}, Options(concurrency_key="idle", on_conflict="join"))
    with db.transaction() as connection:
        made = admission.accept(connection, busy, rung=False).task_id
        lifecycle.cancel(connection, made)
    with db.transaction() as somebody:
        somebody.execute(statements.lock_key_of("tester", "idle"))
        db.run(statements.prune_concurrency_keys(10))  # which waits for nobody
    names = "SELECT string_agg(key, ',' ORDER BY key) FROM concurrency_keys"
    assert scalar(names) == "busy,idle"
    db.run(statements.prune_concurrency_keys(10))
    assert scalar(names) == "busy"
    assert new_id() > made
