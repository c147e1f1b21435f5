"""What a worker does with a notice: claim → validate → run → record.

`perform` runs in the process that does the work: a child of the pool, or the worker itself. The
`Attempt` is the context that the action sees.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID, uuid4

from pydantic import BaseModel
from tenacity import (
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from sutazai import admission, db, lifecycle, log, payload, redis, statements
from sutazai.agent import Action, Agent, Delegation, System, normalise
from sutazai.bell import Bell
from sutazai.errors import (
    DatabaseUnavailable,
    InvalidInput,
    LeaseLost,
    SutazaiError,
    TaskCancelled,
    TaskFailed,
    UnknownAgent,
)
from sutazai.journal import Journal
from sutazai.keeper import Identity
from sutazai.reports import Reports, Word
from sutazai.state import Outcome, State
from sutazai.submission import NO_OPTIONS, Submission

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row


_logger = log.get(__name__)

ALONE_POLL_S = 0.25
"""How often a task that must run alone looks whether it is."""

OUTAGE_S = 120.0
"""How long PostgreSQL is waited for: with a claim, with a child, with an outcome."""

PATIENTLY = Retrying(
    retry=retry_if_exception_type(DatabaseUnavailable),
    wait=wait_random_exponential(multiplier=0.05, max=1),
    stop=stop_after_delay(OUTAGE_S),
    reraise=True,
)
"""Tries again while PostgreSQL is away."""


@dataclass(frozen=True)
class Site:
    """Where attempts run: what `perform` needs beside the task itself."""

    identity: Identity
    reports: Reports
    agents: Mapping[str, Agent]
    system: System
    bell: Bell


class Later(Protocol):
    """Records outcomes a moment later, several together."""

    def add(self, ending: statements.Ending) -> None:
        """Take an outcome that is to be recorded."""


class NotClaimed(Exception):
    """The notice was stale, doubled, early or meant for another host; nothing was done."""


class Requeued(Exception):
    """The attempt ended, and the task is queued again or waits for a child."""


class Unrecorded(Exception):
    """The outcome could not be recorded; the lease runs out, and the task is rescued."""


class Attempt:
    """One claimed attempt; the `Context` of its action."""

    def __init__(
        self,
        site: Site,
        action: Action[Any, Any],
        claim_id: UUID,
        row: Row[Any],
        later: Later | None = None,
    ) -> None:
        """Begin; later: who records a plain outcome, together with others."""
        self._site = site
        self._later = later
        self._began_at = time.monotonic()
        self._action = action
        self._row = row
        self.claim_id = claim_id
        self.task_id: UUID = row.task_id
        self.attempt: int = row.attempt
        self.created_at: datetime = row.created_at
        self.deadline_at: datetime | None = row.deadline_at
        self.host = site.identity.host
        self.agents = site.agents
        self.system = site.system
        self.log = Journal(action.agent, self.task_id, claim_id, self.attempt)
        self._held = lifecycle.Claim(
            row.task_id, claim_id, action.agent, row.parent_id, row.concurrency_key
        )
        self._calls = 0
        self._writes: list[Any] = []
        self._asked_at = time.monotonic()
        self._cancelled = False

    @property
    def idempotency_key(self) -> str:
        """Equal in every attempt of this task."""
        return str(self.task_id)

    @property
    def cancelled(self) -> bool:
        """Whether somebody cancelled this task; asks PostgreSQL at most once a second."""
        if not self._cancelled and time.monotonic() - self._asked_at >= 1.0:
            self._asked_at = time.monotonic()
            with contextlib.suppress(DatabaseUnavailable), db.transaction() as connection:
                row = connection.execute(
                    statements.cancellation(self.task_id, self.claim_id)
                ).first()
                self._cancelled = row is None or row.cancel_requested_at is not None
        return self._cancelled

    def progress(self, fraction: float, message: str = "") -> None:
        """Store how far the work has come, at most once a second."""
        self._cancelled = self.log.progress(fraction, message) or self._cancelled

    def enqueue(
        self, target: Action[Any, Any] | str, params: BaseModel | Mapping[str, Any]
    ) -> UUID:
        """Start a child task; see `Context.enqueue`."""
        action = self._resolve(target)
        if isinstance(params, BaseModel):
            params = params.model_dump(mode="json", exclude_unset=True)
        self._calls += 1
        child = Submission(
            action, params, NO_OPTIONS, "task", parent_id=self.task_id, call_index=self._calls
        )
        bell = self._site.bell
        rung = admission.will_ring(child, bell)

        def accept() -> admission.Accepted:
            with db.transaction() as connection:
                return admission.accept(connection, child, rung=rung)

        # An outage of PostgreSQL is not the action's failure; the n-th call is made once.
        accepted = PATIENTLY(accept)
        # Not fresh: an earlier attempt of this task has made the same call.
        if accepted.fresh and rung:
            bell.ring([child.notice])
        return accepted.task_id

    def delegate(
        self, target: Action[Any, Any] | str, params: BaseModel | Mapping[str, Any]
    ) -> Delegation:
        """Start a child whose outcome becomes this task's; see `Context.delegate`."""
        return Delegation(self.enqueue(target, params))

    def write(self, statement: Any) -> None:
        """Run a statement in the transaction that records the outcome."""
        self._writes.append(statement)

    def run(self) -> str:
        """Validate, run and record; return a short form of the result for those who watch.

        Raises `Requeued` when the task has not ended, `TaskFailed` when it has failed, and
        `LeaseLost` when the outcome came too late to count.
        """
        try:
            if self._row.alone:
                self._wait_alone()
            result = self._action(self._action.parse(self._row.params), self)
            if isinstance(result, Delegation):
                return self._delegated(result)  # which cancels the child of a cancelled task
            if self._cancelled:
                raise TaskCancelled  # the action saw it, and returned early
            stored = self._action.dump(result)
            self._end(State.SUCCEEDED, Outcome.SUCCEEDED, result=stored)
        except (SystemExit, KeyboardInterrupt) as stop:
            if not _is_drain(stop):
                raise self._failed(RuntimeError(f"The action called exit: {stop}")) from stop
            # The worker drains: the attempt is put back, and nothing is charged.
            again = self._action.rerun_after_crash
            with contextlib.suppress(LeaseLost):
                self._record(lambda within: lifecycle.release(within, self._held, again=again))
            _logger.info("task released", ran_s=self._ran_s)
            raise
        except Exception as error:
            raise self._failed(error) from error
        # The row tells it too: at the usual level a worker has no line for each task.
        _logger.debug("task succeeded", ran_s=self._ran_s)
        return payload.dumps(stored)[:200]

    @property
    def _ran_s(self) -> float:
        return round(time.monotonic() - self._began_at, 4)

    def _wait_alone(self) -> None:
        """Wait until nothing else runs on this worker, which starts nothing new meanwhile.

        The task may take its worker down again: then nothing else must be to blame, or harmed.
        """
        others = statements.neighbours(self.task_id, self._site.identity.worker_id)
        try:
            while PATIENTLY(db.run, others)[0].count:
                time.sleep(ALONE_POLL_S)
        except DatabaseUnavailable as error:
            raise Unrecorded(str(error)) from error
        self._limit(self._row.time_limit_s)

    def _limit(self, limit_s: float) -> None:
        """Tell the keeper how long this attempt may take from now on."""
        self._site.reports.tell(Word.BEGAN, (self.task_id, self.claim_id), limit_s=limit_s)

    def _delegated(self, delegation: Delegation) -> str:
        self._record(
            lambda connection: lifecycle.delegate(connection, self._held, delegation.task_id)
        )
        _logger.info("task delegated", child=str(delegation.task_id))
        raise Requeued

    def _failed(self, error: Exception) -> Exception:
        """Record a failed attempt and return what Celery is told."""
        if isinstance(error, Requeued | LeaseLost | Unrecorded):
            return error
        described = lifecycle.error_json(error)
        if self.cancelled:
            cancelled = lifecycle.error_json(TaskCancelled())
            self._end(State.CANCELLED, Outcome.CANCELLED, error=cancelled)
            _logger.info("task cancelled")
            return TaskCancelled()
        if self._action.retries(error) and self._row.failures + 1 < self._row.max_attempts:
            delay_s = lifecycle.backoff_s(self._row.failures + 1)
            self._requeue(Outcome.FAILED, delay_s=delay_s, failures=1, error=described)
            _logger.warning("task will be retried", in_s=round(delay_s, 2), **described)
            return Requeued()
        self._end(State.FAILED, Outcome.FAILED, error=described)
        expected = isinstance(error, TaskFailed | InvalidInput)
        _logger.error("task failed", exc_info=None if expected else error, **described)
        return TaskFailed(described["message"])

    def _end(self, state: State, outcome: Outcome, **values: Any) -> None:
        writes = self._writes if state is State.SUCCEEDED else []

        def record(connection: Connection) -> list[lifecycle.Ended] | None:
            ended = lifecycle.end(connection, self._held, state, outcome, **values)
            for statement in writes if ended else []:
                connection.execute(statement)
            return ended

        if writes or self._held.parent_id or self._held.concurrency_key:
            self._record(record)
            return
        ids = (self.task_id, self.claim_id)
        if self._later is not None:
            self.log.flush()
            ended_at = time.monotonic()
            ending = statements.Ending(*ids, state, outcome, self._began_at, ended_at, **values)
            self._later.add(ending)
            return
        # Most tasks: one statement, so one round trip.
        finish = statements.finish(*ids, state, outcome, **values)
        own = lifecycle.Ended(self.task_id, self._held.agent, state)
        self._record_outcome(lambda: [own] if db.run(finish) else None)

    def _requeue(self, outcome: Outcome, **charge: Any) -> None:
        self._record(
            lambda connection: lifecycle.requeue(connection, self._held, outcome, **charge)
        )

    def _record(self, verb: Callable[[Connection], list[lifecycle.Ended] | None]) -> None:
        def record() -> list[lifecycle.Ended] | None:
            with db.transaction() as connection:
                return verb(connection)

        self._record_outcome(record)

    def _record_outcome(self, record: Callable[[], list[lifecycle.Ended] | None]) -> None:
        """Run a recording transaction, again while PostgreSQL is away; raises `LeaseLost`.

        A commit that raises is uncertain: it may have happened. Repeating is safe, because the
        claim's fence admits it once; then the attempt's row tells which of the two it was.
        """
        self.log.flush()
        uncertain = False
        try:
            ended = record()
        except DatabaseUnavailable:
            uncertain = True
            self._limit(math.inf)  # the work is done: an outage must not make it late
            try:
                ended = PATIENTLY(record)
            except DatabaseUnavailable as error:
                raise Unrecorded(str(error)) from error
        if ended is None:
            with db.transaction() as connection:
                outcome = statements.outcome_of(self.task_id, self.claim_id)
                known = connection.execute(outcome).first()
            if known is None or not uncertain:
                _logger.warning("outcome refused: the attempt had lost its lease")
                raise LeaseLost
            ended = [lifecycle.Ended(self.task_id, self._held.agent, known.state)]
        redis.announce_ended(ended)
        if self._row.alone:
            self._let_others_run()

    def _let_others_run(self) -> None:
        """Have those rung at once that were put off while this task had to be alone."""
        with contextlib.suppress(DatabaseUnavailable):
            db.run(statements.ring_put_off(self._held.agent))
            redis.announce_due()

    def _resolve(self, target: Action[Any, Any] | str) -> Action[Any, Any]:
        if isinstance(target, Action):
            return target
        agent_name, _, action_name = target.rpartition(".")
        agent = self.agents.get(normalise(agent_name))
        if agent is None:
            raise UnknownAgent(f"There is no agent {agent_name!r}.")
        return agent.get(action_name)


def _is_drain(stop: BaseException) -> bool:
    """Whether the worker's signal handler raised this, and not the action itself."""
    trace = stop.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return isinstance(stop, KeyboardInterrupt) or module.split(".")[0] in ("billiard", "celery")


def perform(site: Site, action: Action[Any, Any], task_id: UUID) -> str:
    """Run a task that a notice has announced: claim → validate → run → record.

    Raises `NotClaimed` when there is nothing to do here, and what `Attempt.run` raises.
    """
    if action.agent != site.identity.agent:
        raise NotClaimed  # a message that lay on the wrong queue
    claim_id = uuid4()
    site.reports.tell(Word.CLAIMING, (task_id, claim_id))
    try:
        row = _claim(site, action, task_id, claim_id)
    except Exception:
        site.reports.tell(Word.GONE, (task_id, claim_id))
        raise
    # An exit amid the claim is told by nobody: when this process, a child of the pool, is gone, the
    # keeper puts back what may have been claimed.
    try:
        # The time that a task waits to be alone is not its own.
        limit_s = math.inf if row.alone else row.time_limit_s
        site.reports.tell(Word.BEGAN, (task_id, claim_id), limit_s=limit_s)
        return run(site, action, claim_id, row)
    finally:
        site.reports.tell(Word.GONE, (task_id, claim_id))


def run(
    site: Site,
    action: Action[Any, Any],
    claim_id: UUID,
    row: Row[Any],
    later: Later | None = None,
) -> str:
    """Run what was claimed, with its fields in every log line; raises what `Attempt.run` does."""
    names = {"agent": action.agent, "action": action.name}
    with log.fields(**names, task_id=str(row.task_id), attempt=row.attempt):
        return Attempt(site, action, claim_id, row, later).run()


def adopt(
    site: Site,
    action: Action[Any, Any],
    task_id: UUID,
    args: Sequence[Any],
    params: Mapping[str, Any],
) -> bool:
    """Insert the row of a message that a program without our app has sent; False: it has one.

    Such a message is promised nothing before that. What does not validate is dropped.
    """
    try:
        if action.agent != site.identity.agent:
            raise InvalidInput(f"it came to the queue {site.identity.agent}")
        if args:
            raise InvalidInput("it takes named parameters only")
        submission = Submission(action, params, NO_OPTIONS, "celery", task_id)
        with db.transaction() as connection:
            accepted = admission.accept(connection, submission, rung=True)
    except SutazaiError as error:
        if isinstance(error, DatabaseUnavailable):
            raise
        _logger.warning("dropped a message", task=action.full_name, reason=str(error)[:500])
        return False
    return accepted.fresh


def _claim(site: Site, action: Action[Any, Any], task_id: UUID, claim_id: UUID) -> Row[Any]:
    """Start an attempt; raises `NotClaimed`."""
    claimant = {**claimant_of(site, action), "claim_id": claim_id}
    row: Row[Any] | None = None
    # A task that is given up here waits for its next notice, and one whose claim was committed
    # while its answer got lost waits until the lease ends: so an outage is waited out.
    for attempt in PATIENTLY:
        with attempt:
            row = _try_claim(action, task_id, claimant)
            if row is None and attempt.retry_state.attempt_number > 1:
                row = next(iter(db.run(statements.claimed({task_id: claim_id}))), None)
    if row is None:
        raise NotClaimed
    return row


def claimant_of(site: Site, action: Action[Any, Any]) -> dict[str, Any]:
    """Return who claims, as `statements.claim` wants it."""
    identity = site.identity
    return {
        "agent": action.agent,
        "action": action.name,
        "worker": identity.name,
        "worker_id": identity.worker_id,
        "host": identity.host,
    }


def _try_claim(
    action: Action[Any, Any], task_id: UUID, claimant: Mapping[str, Any]
) -> Row[Any] | None:
    row: Row[Any] | None = next(iter(db.run(statements.claim(task_id, **claimant))), None)
    if row is None:
        limits = lifecycle.KeyLimits(action.key_slots, action.key_rate_per_s)
        with db.transaction() as connection:
            row = lifecycle.claim(connection, task_id, limits, **claimant)
    return row
