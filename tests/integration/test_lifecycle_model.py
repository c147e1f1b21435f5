"""The verbs of a task's life in random order, against what docs/lifecycle.md promises."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from pydantic import BaseModel
from sqlalchemy import select, text

from sutazai import admission, db, lifecycle, statements
from sutazai.agent import RETENTION, Agent, Context, NoParams
from sutazai.errors import KeyReused
from sutazai.models import metadata, new_id
from sutazai.models import tasks as tasks_table
from sutazai.state import MOVES, Outcome, State
from sutazai.submission import Options, Submission

agent = Agent("tester", port=9999, doc="Tests.")

SLOTS = 2
LIMITS = lifecycle.KeyLimits(SLOTS, None)
FAILED = {"code": "task_failed", "message": "As asked.", "retryable": True}


class Number(BaseModel):
    number: int = 0


@agent.action(max_attempts=3)
def work(params: Number, context: Context) -> Number:
    """Work."""
    return params


@agent.action(rerun_after_crash=False)
def once(params: NoParams, context: Context) -> Number:
    """Run at most once."""
    return Number()


def reachable(state: State) -> set[State]:
    """Return every state that a task can come to, whatever happened between two looks."""
    found, new = {state}, {state}
    while new := {after for before in new for after in MOVES[before]} - found:
        found |= new
    return found


class Life(RuleBasedStateMachine):
    """Several workers, clients and keepers that do what they may, one after another."""

    tasks = Bundle("tasks")
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[UUID, Any] = {}
        self.keys: dict[str, tuple[int, UUID]] = {}
        self.workers = [new_id(), new_id()]
        names = ", ".join(table.name for table in metadata.sorted_tables)
        with db.transaction() as connection:
            connection.execute(text(f"TRUNCATE {names}"))

    # --- what clients do

    @rule(
        target=tasks,
        careful=st.booleans(),
        concurrency_key=st.sampled_from([None, "a"]),
        conflict=st.sampled_from(["enqueue", "join", "replace"]),
    )
    def submit(self, careful: bool, concurrency_key: str | None, conflict: Any) -> UUID:
        options = Options(concurrency_key=concurrency_key, on_conflict=conflict)
        with db.transaction() as connection:
            submission = Submission(once if careful else work, {}, options)
            return admission.accept(connection, submission, rung=True).task_id

    @rule(key=st.sampled_from("kl"), number=st.integers(0, 1), target=tasks)
    def submit_under_a_key(self, key: str, number: int) -> Any:
        submission = Submission(work, {"number": number}, Options(idempotency_key=key))
        known = self.keys.get(key)
        with db.transaction() as connection:
            if known is not None and known[0] != number:
                with pytest.raises(KeyReused):
                    admission.accept(connection, submission, rung=True)
                return multiple()
            accepted = admission.accept(connection, submission, rung=True)
        assert accepted.fresh is (known is None)
        self.keys.setdefault(key, (number, accepted.task_id))
        assert self.keys[key][1] == accepted.task_id
        return multiple() if known else accepted.task_id

    @rule(task_id=tasks)
    def cancel(self, task_id: UUID) -> None:
        with db.transaction() as connection:
            lifecycle.cancel(connection, task_id)

    @rule(paused=st.booleans())
    def pause_or_resume(self, paused: bool) -> None:
        with db.transaction() as connection:
            connection.execute(statements.set_queue("tester", paused=paused))

    # --- what workers do

    @rule(task_id=tasks, which=st.integers(0, 1), target=claims)
    def claim(self, task_id: UUID, which: int) -> Any:
        claimant = {"agent": "tester", "claim_id": uuid4(), "worker": f"tester@{which}"}
        claimant |= {"worker_id": self.workers[which], "host": "here"}
        with db.transaction() as connection:
            query = select(tasks_table.c.action, tasks_table.c.concurrency_key)
            known = connection.execute(query.where(tasks_table.c.task_id == task_id)).first()
        if known is None:
            return multiple()  # pruned
        claimant["action"] = known.action
        with db.transaction() as connection:
            row = connection.execute(*statements.claim(task_id, **claimant)).first()
        if row is None:
            with db.transaction() as connection:
                row = lifecycle.claim(connection, task_id, LIMITS, **claimant)
        if row is None:
            return multiple()
        before = self.seen.get(task_id)
        assert before is None or before.state == State.QUEUED
        assert before is None or row.attempt == before.attempt + 1
        claim_id = claimant["claim_id"]
        return lifecycle.Claim(task_id, claim_id, "tester", row.parent_id, known.concurrency_key)

    @rule(claim=claims, fraction=st.floats(0, 1))
    def progress(self, claim: Any, fraction: float) -> None:
        with db.transaction() as connection:
            told = connection.execute(statements.progress(*claim[:2], fraction, "")).all()
        assert bool(told) is self.holds(claim)

    @rule(claim=claims, state=st.sampled_from([State.SUCCEEDED, State.FAILED, State.CANCELLED]))
    def finish(self, claim: Any, state: State) -> None:
        held = self.holds(claim)
        error = None if state is State.SUCCEEDED else FAILED
        result = {"number": 1} if state is State.SUCCEEDED else None
        outcome = Outcome(state.value)
        with db.transaction() as connection:
            ended = lifecycle.end(connection, claim, state, outcome, result=result, error=error)
        # An attempt without its lease must change nothing, any other its task.
        assert (ended is not None) is held
        assert ended is None or ended[0] == (claim.task_id, "tester", state)

    @rule(claim=claims, drained=st.booleans())
    def put_back(self, claim: Any, drained: bool) -> None:
        held = self.holds(claim)
        outcome = Outcome.RELEASED if drained else Outcome.FAILED
        with db.transaction() as connection:
            charge = {} if drained else {"failures": 1, "error": FAILED}
            ended = lifecycle.requeue(connection, claim, outcome, **charge)
        assert (ended is not None) is held

    @rule(claim=claims, target=tasks)
    def delegate(self, claim: Any) -> Any:
        held = self.holds(claim)
        if not held:
            return multiple()
        child = Submission(work, {}, parent_id=claim[0], call_index=1)
        with db.transaction() as connection:
            accepted = admission.accept(connection, child, rung=True)
        with db.transaction() as connection:
            ended = lifecycle.delegate(connection, claim, accepted.task_id)
        assert ended is not None
        return accepted.task_id if accepted.fresh else multiple()

    @rule(claim=consumes(claims), own_process=st.booleans())
    def lose(self, claim: Any, own_process: bool) -> None:
        """The lease of this attempt runs out, and whoever finds it rescues the task."""
        with db.transaction() as connection:
            connection.execute(
                text(
                    "UPDATE tasks SET lease_expires_at = now() - interval '1 s'"
                    " WHERE task_id = :task AND claim_id = :claim AND state = 'running'"
                ),
                {"task": claim[0], "claim": claim[1]},
            )
        with db.transaction() as connection:
            lost = statements.lease_expired(100)
            lifecycle.rescue(connection, lost, own_process=own_process)
        assert not self.holds(claim)

    # --- what time does

    @rule()
    def pass_time(self) -> None:
        """What was put off is due, and held keys are looked at."""
        with db.transaction() as connection:
            connection.execute(text("UPDATE tasks SET run_at = now() WHERE state = 'queued'"))
            connection.execute(statements.wake_keys())

    @rule()
    def prune(self) -> None:
        """Everything that ended is old, and goes, unless its family lives."""
        with db.transaction() as connection:
            connection.execute(
                text(
                    "UPDATE tasks SET finished_at = now() - interval '40 d'"
                    " WHERE finished_at IS NOT NULL"
                )
            )
            connection.execute(statements.prune({}, otherwise=RETENTION, limit=100))
            left = set(connection.execute(text("SELECT task_id FROM tasks")).scalars())
        for task_id in self.seen.keys() - left:
            assert State(self.seen.pop(task_id).state).is_terminal
        self.keys = {key: known for key, known in self.keys.items() if known[1] in left}

    # --- what always holds

    def holds(self, claim: Any) -> bool:
        with db.transaction() as connection:
            found = connection.execute(statements.running_claim(claim[0], claim[1])).first()
        return found is not None

    @invariant()
    def holds_what_is_promised(self) -> None:
        with db.transaction() as connection:
            rows = {r.task_id: r for r in connection.execute(text("SELECT * FROM tasks"))}
            counted = dict(
                connection.execute(
                    text(
                        "SELECT task_id, array_agg(attempt ORDER BY attempt) FROM attempts"
                        " GROUP BY task_id"
                    )
                ).all()
            )
        for task_id, row in rows.items():
            state, before = State(row.state), self.seen.get(task_id)
            attempts = counted.get(task_id, [])
            assert attempts == sorted(set(attempts)), "an attempt ended twice"
            assert len(attempts) == row.attempt - (state is State.RUNNING)
            assert state.is_terminal == (row.finished_at is not None)
            assert (state is State.RUNNING) == (row.lease_expires_at is not None)
            if state is State.QUEUED:
                assert row.cancel_requested_at is None, "a cancelled task is queued again"
            if state is State.WAITING:
                child = rows[row.child_id]
                assert not State(child.state).is_terminal, "a parent waits for what has ended"
            if before is not None:
                assert state in reachable(State(before.state))
                assert row.attempt >= before.attempt
                assert row.failures >= before.failures
                assert row.crashes >= before.crashes
                if State(before.state).is_terminal:
                    same = ("state", "attempt", "result", "error", "failures", "crashes")
                    assert [getattr(row, f) for f in same] == [getattr(before, f) for f in same]
        running = [r for r in rows.values() if r.state == State.RUNNING]
        assert len([r for r in running if r.concurrency_key == "a"]) <= SLOTS
        self.seen = rows


@pytest.mark.usefixtures("database")
def test_any_order_of_verbs_keeps_the_promises() -> None:
    run_state_machine_as_test(Life, settings=settings(max_examples=25, stateful_step_count=30))
