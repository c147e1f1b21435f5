"""One attempt from claim to record, in the test's own process, on a real PostgreSQL."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import insert, select, text

from sutazai import admission, db, lifecycle, statements, worker
from sutazai.agent import Agent, Context, Delegation, NoParams
from sutazai.bell import Notice
from sutazai.errors import InvalidInput, LeaseLost, TaskCancelled, TaskFailed, Unavailable
from sutazai.keeper import QUICK_CLAIMS, STUCK_S, Identity, Keeper
from sutazai.models import new_id, queues, tasks, workers
from sutazai.reports import Reports, Word
from sutazai.state import State
from sutazai.submission import Options, Submission
from sutazai.testing import NoSystem
from sutazai.worker import NotClaimed, Requeued, Site, perform

pytestmark = pytest.mark.usefixtures("database")

agent = Agent("tester", port=9999, doc="Tests.")


class Number(BaseModel):
    number: float = 0.0


@agent.action()
def double(params: Number, context: Context) -> Number:
    """Double."""
    context.progress(1.0, "done")
    return Number(number=params.number * 2)


@agent.action(max_attempts=2, retry_on=(Unavailable,))
def fail(params: Number, context: Context) -> Number:
    """Fail as asked."""
    raise {0: Unavailable, 1: InvalidInput, 2: ZeroDivisionError}[int(params.number)]("as asked")


@agent.action()
def not_a_number(params: NoParams, context: Context) -> Number:
    """Return what is not JSON."""
    return Number(number=float("nan"))


@agent.action()
def write(params: Number, context: Context) -> Number:
    """Write a row with the outcome, or fail after having asked for it."""
    context.write(insert(queues).values(agent="written"))
    if params.number == 1:
        context.write(insert(queues).values(agent="written"))  # violates the primary key
    if params.number == 2:
        raise ValueError("after all")
    return Number()


@agent.action()
def parent(params: NoParams, context: Context) -> Number:
    """Start a child, twice with the same calls when it runs twice."""
    context.enqueue(double, Number(number=1))
    context.enqueue("tester.double", {"number": 2})
    return Number()


@agent.action()
def delegating(params: NoParams, context: Context) -> Number | Delegation:
    """Let a child end this."""
    return context.delegate(double, {"number": 4})


@agent.action()
def cancelled_meanwhile(params: NoParams, context: Context) -> Number:
    """Be cancelled while running, notice it, and stop."""
    with db.transaction() as connection:
        lifecycle.cancel(connection, context.task_id)
    context.progress(1.0)
    assert context.cancelled
    raise Unavailable("stopped")


@agent.action()
def never_looking(params: Number, context: Context) -> Number:
    """Be cancelled while running, report progress if asked to, and end as if nothing was."""
    with db.transaction() as connection:
        lifecycle.cancel(connection, context.task_id)
    if params.number:
        context.progress(1.0)
    return params


@agent.action()
def cancelled_before_it_delegates(params: NoParams, context: Context) -> Number | Delegation:
    """Be cancelled while running, notice it, and delegate all the same."""
    context.enqueue(double, Number(number=1))
    with db.transaction() as connection:
        lifecycle.cancel(connection, context.task_id)
    context.progress(1.0)
    assert context.cancelled
    return context.delegate(double, {"number": 4})


@agent.action()
def overtaken(params: NoParams, context: Context) -> Number:
    """Lose the lease while running."""
    with db.transaction() as connection:
        connection.execute(tasks.update().values(claim_id=new_id()))
    return Number()


def stopped(params: Number, context: Context) -> Number:
    """Be interrupted by the worker's drain."""
    raise KeyboardInterrupt


stopped_again = agent.action()(stopped)
stopped.__name__ = "stopped_once"
stopped_once = agent.action(rerun_after_crash=False)(stopped)


class Silent:
    """A bell whose notices nobody hears: the tests act as the worker themselves."""

    def __init__(self) -> None:
        self.rung: list[Notice] = []

    def room(self, agent: str, priority: int) -> bool:
        return True

    def depth(self, agent: str) -> int | None:
        return 0

    def levels(self, agent: str) -> dict[int, int] | None:
        return None

    def ring(self, notices: Sequence[Notice], pace: Any = None) -> None:
        self.rung += notices


@pytest.fixture
def site() -> Site:
    identity = Identity("tester@here", "tester", "here")
    return Site(identity, Reports(), {"tester": agent}, NoSystem(), Silent())


def run(site: Site, action: Any, **params: Any) -> Any:
    """Accept a task, perform it, and return its row; raises what `perform` raises."""
    submission = Submission(action, params, Options())
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=True)
    try:
        perform(site, action, submission.task_id)
    finally:
        run.task_id = submission.task_id  # type: ignore[attr-defined]
    return read(submission.task_id)


def read(task_id: Any) -> Any:
    with db.transaction() as connection:
        return connection.execute(statements.task(task_id)).one()


def last() -> Any:
    return read(run.task_id)  # type: ignore[attr-defined]


def test_success(site: Site) -> None:
    row = run(site, double, number=2.0)
    assert (row.state, row.result, row.progress["fraction"]) == ("succeeded", {"number": 4.0}, 1)
    assert [attempt["outcome"] for attempt in row.attempts] == ["succeeded"]


def test_a_drain_puts_back_what_may_run_again_and_fails_what_must_not(site: Site) -> None:
    for action, state, outcome in (
        (stopped_again, "queued", "released"),
        (stopped_once, "failed", "lost"),
    ):
        with pytest.raises(KeyboardInterrupt):
            run(site, action)
        row = last()
        assert (row.state, [attempt["outcome"] for attempt in row.attempts]) == (state, [outcome])
        assert (row.error or {}).get("code") == (None if state == "queued" else "worker_lost")


def test_both_ends_of_an_attempt_are_reported(site: Site) -> None:
    run(site, double)
    reports = site.reports.read()
    assert [report.word for report in reports] == [Word.CLAIMING, Word.BEGAN, Word.GONE]
    assert reports[1].task_id == last().task_id
    assert reports[1].limit_s == 60.0


def test_a_second_notice_does_nothing(site: Site) -> None:
    row = run(site, double, number=2.0)
    with pytest.raises(NotClaimed):
        perform(site, double, row.task_id)
    assert read(row.task_id).attempt == 1


def test_an_error_to_be_retried_puts_the_task_back_until_attempts_run_out(site: Site) -> None:
    with pytest.raises(Requeued):
        run(site, fail, number=0.0)
    assert (last().state, last().attempts[0]["error"]["code"]) == ("queued", "task_failed")
    with db.transaction() as connection:
        connection.execute(tasks.update().values(run_at=tasks.c.created_at))
    with pytest.raises(TaskFailed, match="as asked"):
        perform(site, fail, last().task_id)
    assert (last().state, last().error["retryable"]) == ("failed", True)


@pytest.mark.parametrize(
    ("number", "message", "retryable"),
    [(1.0, "as asked", False), (2.0, "ZeroDivisionError: as asked", True)],
)
def test_other_errors_are_final(site: Site, number: float, message: str, retryable: bool) -> None:
    with pytest.raises(TaskFailed):
        run(site, fail, number=number)
    expected = {"code": "task_failed", "message": message, "retryable": retryable}
    assert (last().state, last().error) == ("failed", expected)


def test_a_result_that_is_not_json_fails_the_task(site: Site) -> None:
    with pytest.raises(TaskFailed):
        run(site, not_a_number)
    assert last().error["code"] == "invalid_result"


@pytest.mark.parametrize(
    ("number", "state", "written"),
    [(0.0, "succeeded", ["written"]), (1.0, "failed", []), (2.0, "failed", [])],
    ids=["with success", "a faulty statement", "a failing action"],
)
def test_writes_commit_with_the_outcome_or_not_at_all(
    site: Site, number: float, state: str, written: list[str]
) -> None:
    if state == "succeeded":
        run(site, write, number=number)
    else:
        with pytest.raises(TaskFailed):
            run(site, write, number=number)
    assert last().state == state
    with db.transaction() as connection:
        assert list(connection.execute(select(queues.c.agent)).scalars()) == written


def test_children_of_a_repeated_parent_are_the_same(site: Site) -> None:
    run(site, parent)
    children = [notice.task_id for notice in site.bell.rung]  # type: ignore[attr-defined]
    assert len(children) == 2
    with db.transaction() as connection:
        connection.execute(
            tasks.update()
            .where(tasks.c.task_id == last().task_id)
            .values(state="queued", finished_at=None)
        )
    perform(site, parent, last().task_id)
    with db.transaction() as connection:
        found = connection.execute(
            select(tasks.c.task_id).where(tasks.c.parent_id == last().task_id)
        ).scalars()
        assert sorted(found) == sorted(children)


def test_delegating(site: Site) -> None:
    with pytest.raises(Requeued):
        run(site, delegating)
    assert last().state == "waiting"
    perform(site, double, last().child_id)
    assert (last().state, last().result) == ("succeeded", {"number": 8.0})


def test_a_task_that_delegates_after_its_cancellation_ends_with_its_children(site: Site) -> None:
    with pytest.raises(Requeued):
        run(site, cancelled_before_it_delegates)
    with db.transaction() as connection:
        states = list(connection.execute(select(tasks.c.state)).scalars())
    assert states == ["cancelled"] * 3


def test_a_cancelled_task_is_cancelled_whatever_its_action_raises(site: Site) -> None:
    with pytest.raises(TaskCancelled):
        run(site, cancelled_meanwhile)
    assert last().state == "cancelled"


def test_a_cancelled_task_that_ends_in_time_has_succeeded_unless_it_reported_after_it(
    site: Site,
) -> None:
    run(site, never_looking)
    assert last().state == "succeeded"
    with pytest.raises(TaskCancelled):
        run(site, never_looking, number=1)
    assert last().state == "cancelled"


def test_an_attempt_that_lost_its_lease_records_nothing(site: Site) -> None:
    with pytest.raises(LeaseLost):
        run(site, overtaken)
    assert (last().state, last().result, last().attempts) == ("running", None, None)


# --- the keeper -----------------------------------------------------------------------------


def keeper_of(site: Site, *, consuming: bool = True, broker_answers: bool = True) -> Keeper:
    return Keeper(
        site.identity,
        site.reports,
        site.agents,
        slots=lambda: 2,
        consuming=lambda: consuming,
        broker_answers=lambda: broker_answers,
        each_beat=lambda: None,
    )


def _wait_for(seen: Any) -> None:
    done = threading.Event()
    for _ in range(200):
        if seen():
            return
        done.wait(0.05)
    pytest.fail("not in time")


def test_the_keeper_keeps_a_heartbeat_and_says_when_the_worker_stops(site: Site) -> None:
    keeper = keeper_of(site)
    keeper.start()

    def row() -> Any:
        with db.transaction() as connection:
            return connection.execute(workers.select()).first()

    _wait_for(row)
    assert (row().name, row().slots, row().pid) == ("tester@here", 2, site.identity.pid)
    keeper.stop()
    assert row().stopped_at is not None


def test_many_claims_are_told_before_the_next_heartbeat(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sutazai.keeper.HEARTBEAT_S", 3600.0)
    keeper = keeper_of(site)
    keeper.start()
    try:
        _wait_for(lambda: db.run(workers.select()))
        for _ in range(QUICK_CLAIMS):
            claim = (new_id(), new_id())
            site.reports.tell(Word.BEGAN, claim, limit_s=60)
            site.reports.tell(Word.GONE, claim)
        _wait_for(lambda: db.run(workers.select())[0].claims == QUICK_CLAIMS)
    finally:
        keeper.stop()


@pytest.mark.parametrize(
    ("faults", "restarts"),
    [
        ({}, True),
        ({"consuming": False}, False),
        ({"broker_answers": False}, False),
        ({"paused": True}, False),
        ({"age_s": 0}, False),
        ({"host": "elsewhere"}, False),
        ({"relay": False}, False),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_worker_that_does_not_consume_restarts_itself(
    site: Site, faults: dict[str, Any], restarts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sutazai.keeper.STUCK_CHECK_S", 0.0)
    told = []
    monkeypatch.setattr("sutazai.keeper.os.kill", lambda pid, number: told.append((pid, number)))
    submission = Submission(double, {}, Options(), host=faults.get("host"))
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=True)
        age = f"now() - interval '{faults.get('age_s', 61)} seconds'"
        connection.execute(text(f"UPDATE tasks SET run_at = {age}"))
        connection.execute(statements.set_queue("tester", paused=faults.get("paused", False)))
        if faults.get("relay", True):
            connection.execute(statements.serve("relay", "one"))
    known = ("consuming", "broker_answers")
    keeper = keeper_of(site, **{name: faults[name] for name in known if name in faults})
    now = time.monotonic()
    keeper._restart_if_stuck(now)
    assert not told, "it has only just begun to wait"
    keeper._restart_if_stuck(now + STUCK_S + 1)
    assert told == ([(os.getpid(), signal.SIGTERM)] if restarts else [])
    keeper._restart_if_stuck(now + STUCK_S + 2)
    assert len(told) <= 1


def test_a_message_of_another_program_is_adopted_once(site: Site) -> None:
    task_id = new_id()
    assert not worker.adopt(site, double, task_id, [1], {}), "positional arguments have no names"
    assert not worker.adopt(site, double, task_id, [], {"number": "x"})
    assert worker.adopt(site, double, task_id, [], {"number": 4})
    assert not worker.adopt(site, double, task_id, [], {"number": 4})
    perform(site, double, task_id)
    row = read(task_id)
    assert (row.state, row.result) == ("succeeded", {"number": 8.0})
    assert not worker.adopt(site, double, task_id, [], {"number": 4}), (
        "a second delivery does nothing"
    )


def test_a_notice_runs_no_other_action_than_the_rows(site: Site) -> None:
    submission = Submission(double, {"number": 1}, Options())
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=True)
    with pytest.raises(NotClaimed):
        perform(site, fail, submission.task_id)
    assert read(submission.task_id).attempt == 0


def test_a_message_on_the_wrong_queue_is_neither_run_nor_adopted(site: Site) -> None:
    elsewhere = Agent("elsewhere", port=9998, doc="Tests.")

    @elsewhere.action()
    def double(params: Number, context: Context) -> Number:
        """Double."""
        return params

    submission = Submission(double, {}, Options())
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=True)
    with pytest.raises(NotClaimed):
        perform(site, double, submission.task_id)
    assert not worker.adopt(site, double, new_id(), [], {})


def test_a_new_worker_takes_over_at_once_what_its_dead_predecessor_ran(
    site: Site, relays_are_told: Any
) -> None:
    dead = Identity("tester@here", "tester", "here", pid=2**22 + 1)
    submission = Submission(double, {}, Options())
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=True)
        connection.execute(statements.enlist({**dead.row, "slots": 1}))
        connection.execute(
            *statements.claim(
                submission.task_id,
                agent="tester",
                action="double",
                claim_id=new_id(),
                worker=dead.name,
                worker_id=dead.worker_id,
                host="here",
            )
        )
    assert read(submission.task_id).state == State.RUNNING
    keeper_of(site).enlist()
    assert relays_are_told()
    row = read(submission.task_id)
    assert (row.state, row.attempts[0]["outcome"]) == ("queued", "lost")
    with db.transaction() as connection:
        stopped = connection.execute(
            select(workers.c.stopped_at).where(workers.c.worker_id == dead.worker_id)
        ).scalar()
    assert stopped is not None


def test_tasks_whose_notices_died_with_their_process_are_rung_again_at_once(
    site: Site, relays_are_told: Any
) -> None:
    submission = Submission(double, {}, Options())
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=True)
    keeper = keeper_of(site)
    keeper._ring_lost()
    assert not relays_are_told(), "nothing was lost"
    keeper.lost_notice([submission.task_id])
    keeper._ring_lost()
    assert relays_are_told()
    assert db.run(text("SELECT next_ring_at <= now(), rings FROM tasks")) == [(True, 0)]


def test_a_worker_whose_enlisting_was_never_confirmed_enlists_again(site: Site) -> None:
    for _ in range(2):
        keeper_of(site).enlist()
    with db.transaction() as connection:
        assert len(connection.execute(select(workers.c.worker_id)).all()) == 1


@pytest.mark.parametrize(
    "difference",
    [{"boot_id": "another"}, {"pid_namespace": "another"}],
    ids=["another boot", "another container"],
)
def test_a_worker_that_cannot_be_compared_is_left_to_its_lease(
    site: Site, difference: dict[str, str]
) -> None:
    other = Identity("tester@here", "tester", "here", pid=2**22 + 1, **difference)
    with db.transaction() as connection:
        connection.execute(statements.enlist({**other.row, "slots": 1}))
    keeper_of(site).enlist()
    with db.transaction() as connection:
        assert connection.execute(
            select(workers.c.worker_id).where(workers.c.stopped_at.is_(None))
        ).scalars().all() == [other.worker_id, site.identity.worker_id]


def test_a_reused_pid_is_told_from_the_old_process(site: Site) -> None:
    # Our own pid lives, but the recorded process began long before.
    old = Identity("tester@here", "tester", "here", process_started_at=1.0)
    with db.transaction() as connection:
        connection.execute(statements.enlist({**old.row, "slots": 1}))
        [row] = connection.execute(statements.predecessors("tester@here", new_id()))
    assert site.identity.has_outlived(row)
    assert not site.identity.has_outlived(_with_own_start(row, site.identity))


def _with_own_start(row: Any, identity: Identity) -> Any:
    return type("Row", (), {**row._mapping, "process_started_at": identity.process_started_at})


def test_backoff_has_full_jitter_within_growing_bounds() -> None:
    for failures in range(1, 12):
        delays = [lifecycle.backoff_s(failures) for _ in range(300)]
        bound = min(300, 2**failures)
        assert 0 <= min(delays) < bound / 4
        assert bound * 3 / 4 < max(delays) <= bound
