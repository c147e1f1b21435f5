"""The verbs of a task's life that take more than one statement, each within one transaction.

They are plain functions of a connection; fronts run them through `AsyncConnection.run_sync`.
docs/lifecycle.md is the chart. The order of locks is the same everywhere: the concurrency key, the
parent, the task, and then upwards from the parent. Without the parent's lock two children that end
together would both overlook each other.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from sutazai import statements
from sutazai.errors import (
    DeadlineExceeded,
    Poison,
    SutazaiError,
    TaskFailed,
    WorkerLost,
)
from sutazai.state import Outcome, State

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row, Select


CRASHES_ALLOWED = 2
"""The next crash of the task's own process makes it poison."""

SECOND_CRASH_DELAY_S = 5.0


class KeyLimits(NamedTuple):
    """What an action allows the tasks of one concurrency key."""

    slots: int
    rate_per_s: float | None


class Claim(NamedTuple):
    """An attempt that runs, and what must be locked before its task."""

    task_id: UUID
    claim_id: UUID
    agent: str
    parent_id: UUID | None
    concurrency_key: str | None


class Ended(NamedTuple):
    """A task that became terminal, for those who wait for it."""

    task_id: UUID
    agent: str
    state: str


def end(
    connection: Connection,
    held: Claim,
    state: State,
    outcome: Outcome,
    *,
    result: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
) -> list[Ended] | None:
    """Make a running task terminal; return all that has ended with it, or None: lease lost."""
    _lock_before(connection, [held])
    finish = statements.finish(
        held.task_id, held.claim_id, state, outcome, result=result, error=error
    )
    return _follow(connection, held, connection.execute(*finish).first())


def requeue(
    connection: Connection, held: Claim, outcome: Outcome, **charge: Any
) -> list[Ended] | None:
    """Put a running task back; return what has ended (it was cancelled), or None: lease lost."""
    _lock_before(connection, [held])
    left = statements.requeue(held.task_id, held.claim_id, outcome, **charge)
    return _follow(connection, held, connection.execute(left).first())


def time_out(
    connection: Connection,
    held: Claim,
    charge: Row[Any],
    error: Mapping[str, Any],
    *,
    retries: bool,
) -> list[Ended] | None:
    """End an attempt that was killed at its limit; return what has ended, or None: lease lost.

    It is tried again if its action `retries` after this error, may run twice, and has attempts
    left.
    """
    failures = charge.failures + 1
    if retries and charge.rerun_after_crash and failures < charge.max_attempts:
        charged = {"failures": 1, "delay_s": backoff_s(failures), "error": error}
        return requeue(connection, held, Outcome.TIMED_OUT, **charged)
    return end(connection, held, State.FAILED, Outcome.TIMED_OUT, error=error)


def release(connection: Connection, held: Claim, *, again: bool) -> list[Ended] | None:
    """Put back, uncharged, a running task whose process is going to be ended; None: lease lost.

    again=False: it must not run twice, and fails instead.
    """
    if again:
        return requeue(connection, held, Outcome.RELEASED)
    error = error_json(WorkerLost("The worker ended itself, and the action must not run twice."))
    return end(connection, held, State.FAILED, Outcome.LOST, error=error)


def delegate(connection: Connection, held: Claim, child_id: UUID) -> list[Ended] | None:
    """Let a running task wait for its child, which may have ended already; None: lease lost."""
    _lock_before(connection, [held._replace(parent_id=None)])
    connection.execute(statements.lock([held.task_id]))
    left = statements.wait_for_child(held.task_id, held.claim_id, child_id)
    row = connection.execute(left).first()
    ended = _follow(connection, held._replace(parent_id=None), row)
    if ended is None:
        return None
    if connection.execute(statements.cancel_requested(held.task_id)).scalar():
        ended += cancel(connection, held.task_id)
    return ended + wake_parent(connection, child_id, held.task_id)


def _lock_before(connection: Connection, held: Sequence[Claim]) -> set[UUID]:
    """Lock the keys and parents of tasks, in one order, before the tasks themselves.

    Returns the parents that are locked: with several tasks, one that somebody else holds is left
    out, and must not keep the others from being seen to.
    """
    keys = {(each.agent, each.concurrency_key) for each in held if each.concurrency_key}
    for agent, key in sorted(keys):
        connection.execute(statements.lock_key_of(agent, key))
    parents = sorted({each.parent_id for each in held if each.parent_id})
    if not parents:
        return set()
    lock = statements.lock(parents, skip_locked=len(held) > 1)
    return set(connection.execute(lock).scalars())


def _follow(connection: Connection, held: Claim, left: Row[Any] | None) -> list[Ended] | None:
    """Do what follows when a task has left running: its parent and its key may go on."""
    if left is None:
        return None
    ended = []
    if State(left.state).is_terminal:
        ended.append(Ended(held.task_id, held.agent, left.state))
        if held.parent_id:
            ended += wake_parent(connection, held.task_id, held.parent_id)
    if held.concurrency_key:
        connection.execute(statements.wake_key(held.agent, held.concurrency_key))
    return ended


def claim(
    connection: Connection, task_id: UUID, limits: KeyLimits, **claimant: Any
) -> Row[Any] | None:
    """Claim a task that `statements.claim` did not, most often because of its concurrency key.

    The key's row is locked first: without it, two workers that count at the same time would both
    find room. No row: held until the key has room, put off, or nothing to claim at all.
    """
    found = connection.execute(statements.unclaimed(task_id, claimant["worker_id"])).first()
    if found is None:
        return None
    if found.beside_suspect:
        connection.execute(statements.put_off(task_id))
        return None
    if not found.concurrency_key:
        # A suspect that has ended since may have been all that kept it: its notice comes but once.
        return connection.execute(*statements.claim(task_id, **claimant)).first()
    key = (found.agent, found.concurrency_key)
    lock = statements.lock_key(*key, limits.slots, limits.rate_per_s)
    is_open = connection.execute(lock).scalar_one()
    running = connection.execute(statements.running_of_key(*key)).scalar_one()
    if not is_open or running >= limits.slots:
        connection.execute(statements.hold(task_id))
        return None
    row = connection.execute(*statements.claim_of_key(task_id, **claimant)).first()
    if row is not None and limits.rate_per_s:
        connection.execute(statements.start_of_key(*key))
    return row


def wake_parent(connection: Connection, task_id: UUID, parent_id: UUID) -> list[Ended]:
    """Give the outcome of an ended task to the ancestors that wait for it."""
    woken = []
    row = connection.execute(statements.advance_parent(task_id, parent_id)).first()
    while row is not None:
        woken.append(Ended(row.task_id, row.agent, row.state))
        if row.parent_id is None:
            break
        connection.execute(statements.lock([row.parent_id]))
        row = connection.execute(statements.advance_parent(row.task_id, row.parent_id)).first()
    return woken


def cancel(connection: Connection, task_id: UUID) -> list[Ended]:
    """Cancel a task and, if it waits, all its children; return what ended at once.

    A running task learns of it through its context, and is ended by force after the grace.
    """
    family = connection.execute(statements.family_of(task_id)).all()
    waiting = {row.task_id: row.child_id for row in family if row.state == State.WAITING}
    others: dict[UUID, list[UUID]] = {parent_id: [] for parent_id in waiting}
    for row in family:
        if row.parent_id in others and row.task_id not in waiting:
            others[row.parent_id].append(row.task_id)
    # As those lock that end: a parent, then its child, and then upwards.
    for parent_id, children in others.items():
        connection.execute(statements.lock([parent_id]))
        connection.execute(statements.lock(children))
    if family and family[-1].parent_id:
        connection.execute(statements.lock([family[-1].parent_id]))
    ended = []
    awaited = {task_id, *waiting.values()}
    for now in connection.execute(statements.cancel([row.task_id for row in family])).all():
        if now.state == State.CANCELLED:
            ended.append(Ended(now.task_id, now.agent, now.state))
            if now.parent_id and now.task_id in awaited:
                ended += wake_parent(connection, now.task_id, now.parent_id)
        elif now.state == State.WAITING and now.task_id not in waiting:
            ended += cancel(connection, now.task_id)  # it has begun to wait just now
    return ended


def set_queue(
    connection: Connection,
    agent: str,
    *,
    paused: bool | None = None,
    draining: bool | None = None,
) -> None:
    """Pause, drain or resume an agent's queue; what is None stays."""
    connection.execute(statements.set_queue(agent, paused=paused, draining=draining))
    if paused is False:
        # Notices that came while it was paused did nothing.
        connection.execute(*statements.ring_afresh(agent))


def expire(connection: Connection, limit: int = 500) -> list[Ended]:
    """Fail queued tasks whose deadline has passed; one that somebody works on is left for later."""
    error = error_json(DeadlineExceeded("The deadline passed before a worker was free."))
    return _fail_queued(connection, statements.past_deadline(limit), error)


def refuse(
    connection: Connection, task_id: UUID, agent: str, action: str, why: SutazaiError
) -> list[Ended]:
    """Fail a queued task that its agent's worker cannot run; one of another action is left."""
    error = {**error_json(why), "code": why.code}
    return _fail_queued(connection, statements.queued_of(task_id, agent, action), error)


def _fail_queued(
    connection: Connection, wanted: Select[Any], error: Mapping[str, Any]
) -> list[Ended]:
    found = _lockable(connection, wanted)
    if not found:
        return []
    gone = []
    for row in connection.execute(
        statements.end_queued([row.task_id for row in found], State.FAILED, error)
    ).all():
        gone.append(Ended(row.task_id, row.agent, State.FAILED))
        if row.parent_id:
            gone.extend(wake_parent(connection, row.task_id, row.parent_id))
    return gone


class Rescued(NamedTuple):
    """What taking back the tasks of dead workers came to."""

    tasks: int
    ended: list[Ended]


def rescue(connection: Connection, lost: Select[Any], *, own_process: bool = False) -> Rescued:
    """Take back the tasks of dead workers: queued again, or failed when that must not be.

    A crash is charged only when the task's own process died (`own_process`), or its worker died
    while it ran nothing else; otherwise a neighbour may be to blame. All that a dead worker ran are
    suspects from then on and run alone, so that the next death is charged to one.
    """
    ended: list[Ended] = []
    rows = _lockable(connection, lost)  # read before any of them has moved
    for row in rows:
        died = own_process or row.worker_is_dead
        charged = own_process or (row.worker_is_dead and row.ran_alone)
        ended += _rescue_one(connection, row, charged=charged, alone=died) or ()
    if rows:
        connection.execute(*statements.ring_children([row.task_id for row in rows]))
    return Rescued(len(rows), ended)


def _lockable(connection: Connection, wanted: Select[Any]) -> Sequence[Row[Any]]:
    """Return the rows of a query, locked, without those that somebody else has locked."""
    found = connection.execute(wanted).all()
    if not found:
        return []
    locked = _lock_before(connection, [_claim_of(row) for row in found])
    return [
        row
        for row in connection.execute(wanted.with_for_update(skip_locked=True)).all()
        if row.parent_id is None or row.parent_id in locked
    ]


def _claim_of(row: Row[Any]) -> Claim:
    return Claim(row.task_id, row.claim_id, row.agent, row.parent_id, row.concurrency_key)


def _rescue_one(
    connection: Connection, row: Row[Any], *, charged: bool, alone: bool
) -> list[Ended] | None:
    crashes = row.crashes + int(charged)
    fatal: SutazaiError | None = None
    if not row.rerun_after_crash:
        fatal = WorkerLost("The worker died while the task ran, and the action must not run twice.")
    elif crashes > CRASHES_ALLOWED:
        fatal = Poison(f"The task's process died {crashes} times; it is not tried again.")
    if fatal:
        error = error_json(fatal)
        return end(connection, _claim_of(row), State.FAILED, Outcome.LOST, error=error)
    return requeue(
        connection,
        _claim_of(row),
        Outcome.LOST,
        crashes=int(charged),
        alone=alone,
        delay_s=SECOND_CRASH_DELAY_S if charged and crashes > 1 else 0.0,
        error=error_json(WorkerLost("The worker died while the task ran.")),
    )


def backoff_s(failures: int, *, base_s: float = 1.0, most_s: float = 300.0) -> float:
    """Return a delay with full jitter: uniform between 0 and an exponentially growing bound.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return random.uniform(0, min(most_s, base_s * 2 ** min(failures, 20)))  # noqa: S311


def error_json(error: BaseException) -> dict[str, Any]:
    """Return the `error` of a task's JSON: code, message, and whether a new task may help."""
    if isinstance(error, SutazaiError):
        code = error.code if isinstance(error, TaskFailed) else "task_failed"
        message = str(error)
        retryable = error.retryable
    else:
        code = "task_failed"
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        retryable = True
    # Neither NUL nor a lone surrogate, as in the name of a file, can be stored.
    message = message.replace("\x00", "�").encode(errors="replace").decode()
    return {"code": code, "message": message[:4000], "retryable": retryable}
