"""The verbs of a task's life that take more than one statement, each within one transaction.

They are plain functions of a connection; fronts run them through `AsyncConnection.run_sync`.
docs/lifecycle.md is the chart. The order of locks is the same everywhere: the parent first, then
the task, so that two children that end together cannot both overlook each other.
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


class Ended(NamedTuple):
    """A task that became terminal, for those who wait for it."""

    task_id: UUID
    agent: str
    state: str


def end(
    connection: Connection,
    task_id: UUID,
    claim_id: UUID,
    state: State,
    outcome: Outcome,
    *,
    parent_id: UUID | None = None,
    result: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
) -> bool:
    """Make a running task terminal and wake its parent; False: this attempt lost its lease."""
    if parent_id:
        connection.execute(statements.lock(parent_id))
    done = connection.execute(
        statements.finish(task_id, claim_id, state, outcome, result=result, error=error)
    ).first()
    _follow(connection, done, parent_id)
    return done is not None


def requeue(
    connection: Connection,
    task_id: UUID,
    claim_id: UUID,
    outcome: Outcome,
    *,
    parent_id: UUID | None = None,
    **charge: Any,
) -> bool:
    """Put a running task back (or end it, when it was cancelled meanwhile)."""
    if parent_id:
        connection.execute(statements.lock(parent_id))
    done = connection.execute(statements.requeue(task_id, claim_id, outcome, **charge)).first()
    _follow(connection, done, parent_id)
    return done is not None


def _follow(connection: Connection, left: Row[Any] | None, parent_id: UUID | None) -> None:
    """Do what follows when a task has left running: its parent and its key may go on."""
    if left is None:
        return
    if parent_id:
        wake_parent(connection, left.task_id, parent_id)
    if left.concurrency_key:
        connection.execute(statements.lock_key_of(left.agent, left.concurrency_key))
        connection.execute(statements.wake_key(left.agent, left.concurrency_key))


def claim(
    connection: Connection, task_id: UUID, limits: KeyLimits, **claimant: Any
) -> Row[Any] | None:
    """Claim a task that `statements.claim` did not, because its key limits how many run at once.

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
        return None
    key = (found.agent, found.concurrency_key)
    lock = statements.lock_key(*key, limits.slots, limits.rate_per_s)
    is_open = connection.execute(lock).scalar_one()
    running = connection.execute(statements.running_of_key(*key)).scalar_one()
    if not is_open or running >= limits.slots:
        connection.execute(statements.hold(task_id))
        return None
    row = connection.execute(statements.claim_of_key(task_id, **claimant)).first()
    if row is not None and limits.rate_per_s:
        connection.execute(statements.start_of_key(*key))
    return row


def delegate(connection: Connection, task_id: UUID, claim_id: UUID, child_id: UUID) -> bool:
    """Let a running task wait for its child, which may have ended already."""
    connection.execute(statements.lock(task_id))
    done = connection.execute(statements.wait_for_child(task_id, claim_id, child_id)).first()
    if done and connection.execute(statements.cancel_requested(task_id)).scalar():
        cancel(connection, child_id)
    _follow(connection, done, None)
    if done:
        wake_parent(connection, child_id, task_id)
    return done is not None


def wake_parent(connection: Connection, task_id: UUID, parent_id: UUID) -> list[Ended]:
    """Give the outcome of an ended task to the ancestors that wait for it."""
    woken = []
    row = connection.execute(statements.advance_parent(task_id, parent_id)).first()
    while row is not None:
        woken.append(Ended(row.task_id, row.agent, row.state))
        if row.parent_id is None:
            break
        connection.execute(statements.lock(row.parent_id))
        row = connection.execute(statements.advance_parent(row.task_id, row.parent_id)).first()
    return woken


def cancel(connection: Connection, task_id: UUID) -> list[Ended]:
    """Cancel a task, and the child it waits for; return what ended at once.

    A running task learns of it through its context, and is ended by force after the grace.
    """
    parent_id = connection.execute(statements.parent_of(task_id)).scalar()
    if parent_id:
        connection.execute(statements.lock(parent_id))
    row = connection.execute(statements.cancel(task_id)).first()
    if row is None:
        return []
    if row.state == State.WAITING and row.child_id:
        return cancel(connection, row.child_id)
    if row.state != State.CANCELLED:
        return []
    return [Ended(task_id, row.agent, row.state)] + (
        wake_parent(connection, task_id, parent_id) if parent_id else []
    )


def expire(connection: Connection, limit: int = 500) -> list[Ended]:
    """Fail queued tasks whose deadline has passed."""
    late = connection.execute(statements.past_deadline(limit)).all()
    if not late:
        return []
    _lock_parents(connection, late)
    error = error_json(DeadlineExceeded("The deadline passed before a worker was free."))
    gone = []
    for row in connection.execute(
        statements.end_queued([row.task_id for row in late], State.FAILED, error)
    ).all():
        gone.append(Ended(row.task_id, row.agent, State.FAILED))
        if row.parent_id:
            gone.extend(wake_parent(connection, row.task_id, row.parent_id))
    return gone


def rescue(connection: Connection, lost: Select[Any], *, own_process: bool = False) -> list[Ended]:
    """Take back the tasks of dead workers: queued again, or failed when that must not be.

    A crash is charged only when the task's own process died (`own_process`), or its worker died
    while it ran nothing else; otherwise a neighbour may be to blame.
    """
    known = _lock_parents(connection, connection.execute(lost).all())
    rows = [
        row
        for row in connection.execute(lost.with_for_update(skip_locked=True)).all()
        if row.parent_id is None or row.parent_id in known
    ]
    alone = {row.task_id: row.neighbours == 0 for row in rows}  # before any of them has moved
    return [
        Ended(row.task_id, row.agent, State.FAILED)
        for row in rows
        if _rescue_one(
            connection,
            row,
            charged=own_process or (row.worker_is_dead and alone[row.task_id]),
        )
    ]


def _rescue_one(connection: Connection, row: Row[Any], *, charged: bool) -> bool:
    crashes = row.crashes + int(charged)
    fatal: SutazaiError | None = None
    if not row.rerun_after_crash:
        fatal = WorkerLost("The worker died while the task ran, and the action must not run twice.")
    elif crashes > CRASHES_ALLOWED:
        fatal = Poison(f"The task's process died {crashes} times; it is not tried again.")
    if fatal:
        return end(
            connection,
            row.task_id,
            row.claim_id,
            State.FAILED,
            Outcome.LOST,
            parent_id=row.parent_id,
            error=error_json(fatal),
        )
    return requeue(
        connection,
        row.task_id,
        row.claim_id,
        Outcome.LOST,
        parent_id=row.parent_id,
        crashes=int(charged),
        delay_s=SECOND_CRASH_DELAY_S if charged and crashes > 1 else 0.0,
        error=error_json(WorkerLost("The worker died while the task ran.")),
    )


def _lock_parents(connection: Connection, rows: Sequence[Row[Any]]) -> set[UUID]:
    """Lock the parents of rows, in one order, before the rows themselves."""
    parents = {row.parent_id for row in rows if row.parent_id}
    for parent_id in sorted(parents):
        connection.execute(statements.lock(parent_id))
    return parents


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
