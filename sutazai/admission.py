"""Admission: what becomes a task, what is an earlier one again, and what is refused.

Every way in goes through `accept`: routes, command line, schedules, children, Celery. It runs
within one transaction; fronts run it through `AsyncConnection.run_sync`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from sutazai import lifecycle, statements
from sutazai.bell import Bell
from sutazai.errors import KeyBusy, KeyReused, QueueDraining, QueueFull
from sutazai.submission import Submission

if TYPE_CHECKING:
    from sqlalchemy import Connection

CHUNK = 2000
"""Rows of one INSERT."""


class Accepted(NamedTuple):
    """The task that stands for a submission."""

    task_id: UUID
    fresh: bool
    """Whether this submission made it; else it was there before."""

    replaced: Sequence[lifecycle.Ended] = ()
    """What was cancelled in its favour."""

    replayed: bool = False
    """Whether an earlier request with the same idempotency key has got this task."""


def will_ring(submission: Submission, bell: Bell | None) -> bool:
    """Whether the caller should publish a notice right after it has committed."""
    return bool(
        bell
        and submission.is_due
        and bell.room(submission.action.agent, submission.options.priority)
    )


def accept(
    connection: Connection, submission: Submission, *, rung: bool, limit: int | None = None
) -> Accepted:
    """Insert a task, or find the one that it repeats. `rung`: the caller rings after the commit.

    limit: refuse when the queue would hold more due tasks. Raises `KeyReused`, `KeyBusy`,
    `QueueFull` and `QueueDraining`; then nothing was stored. The same submission twice is one task.
    """
    known = _replay(connection, submission)
    if known is not None:
        return known
    _check_room(connection, [submission], limit)
    stands, replaced = _resolve_conflict(connection, submission)
    if stands is not None:
        return stands
    statement = statements.accept(submission.row, rung=rung)
    if connection.execute(*statement).first() is not None:
        return Accepted(submission.task_id, fresh=True, replaced=replaced)
    # Nothing was inserted: somebody else was quicker, or it is there from the first try.
    return _replay(connection, submission) or _existing(connection, submission)


def _existing(connection: Connection, submission: Submission) -> Accepted:
    if submission.parent_id and submission.call_index:
        child = statements.child_of(submission.parent_id, submission.call_index)
        return Accepted(connection.execute(child).scalar_one(), fresh=False)
    is_there = connection.execute(statements.parent_of(submission.task_id)).all()
    if submission.tick_at is None and not is_there:
        raise _draining(submission.action.agent)  # it did just now
    return Accepted(submission.task_id, fresh=False)


def accept_many(
    connection: Connection, submissions: Sequence[Submission], *, limit: int | None = None
) -> list[UUID]:
    """Insert many tasks, all or none, and return their ids in order; the relay rings them.

    Raises as `accept` does; then the caller rolls back.
    """
    plain: list[Submission] = []
    careful: list[Submission] = []
    for submission in submissions:
        (careful if submission.options.resolves_conflict else plain).append(submission)
    taken = _reserve(connection, plain)
    ids = {submission.task_id: submission.task_id for submission in plain} | taken
    fresh = [submission for submission in plain if submission.task_id not in taken]
    _check_room(connection, fresh, limit)
    for start in range(0, len(fresh), CHUNK):
        chunk = [submission.row for submission in fresh[start : start + CHUNK]]
        inserted = connection.execute(*statements.accept_many(chunk)).all()
        if len(inserted) < len(chunk):
            raise _draining(chunk[0]["agent"])  # it did just now
    # In one order, as the keys before: each locks its concurrency key.
    for submission in sorted(careful, key=lambda each: str(each.options.concurrency_key)):
        accepted = accept(connection, submission, rung=False, limit=limit)
        ids[submission.task_id] = accepted.task_id
    return [ids[submission.task_id] for submission in submissions]


def _reserve(connection: Connection, submissions: Sequence[Submission]) -> dict[UUID, UUID]:
    """Take the idempotency keys of submissions; return the tasks of those that were taken."""
    taken: dict[UUID, UUID] = {}
    first: dict[tuple[str, str, str], Submission] = {}
    for submission in submissions:
        key = submission.options.idempotency_key
        if key is not None:
            holder = (submission.principal, submission.action.agent, key)
            earlier = first.setdefault(holder, submission)
            if earlier.fingerprint != submission.fingerprint:
                raise _reused(key, earlier.task_id)
            if earlier is not submission:
                taken[submission.task_id] = earlier.task_id
    # In the order of the keys, so that two batches with the same ones do not deadlock.
    wanted = [first[holder] for holder in sorted(first)]
    for start in range(0, len(wanted), CHUNK):
        chunk = wanted[start : start + CHUNK]
        rows = [submission.row for submission in chunk]
        free = set(connection.execute(statements.reserve_keys(rows)).scalars())
        for submission in chunk:
            if submission.task_id not in free:
                known = _replay(connection, submission) or _take_expired(connection, submission)
                if known is not None:
                    taken[submission.task_id] = known.task_id
    return {task_id: taken.get(first_id, first_id) for task_id, first_id in taken.items()}


def _take_expired(connection: Connection, submission: Submission) -> Accepted | None:
    """Take a key that has expired; or return the task of a request that was quicker."""
    if connection.execute(statements.reserve_keys([submission.row])).first() is not None:
        return None
    return _replay(connection, submission)


def _replay(connection: Connection, submission: Submission) -> Accepted | None:
    """Return the task that this one's idempotency key has made before; raises `KeyReused`."""
    key = submission.options.idempotency_key
    if key is None:
        return None
    holder = (submission.principal, submission.action.agent, key)
    found = connection.execute(statements.keyed(*holder)).first()
    if found is None:
        return None
    if found.expired:
        connection.execute(statements.forget_key(*holder, found.task_id))
        return None
    if found.fingerprint != submission.fingerprint:
        raise _reused(key, found.task_id)
    # The own one: the first try of this very request, whose answer got lost.
    return Accepted(found.task_id, fresh=False, replayed=found.task_id != submission.task_id)


def _reused(key: str, task_id: UUID) -> KeyReused:
    return KeyReused(
        f"The idempotency key {key!r} was used for another request, task {task_id}; "
        "use a new key for a new request."
    )


def _check_room(
    connection: Connection, submissions: Sequence[Submission], limit: int | None
) -> None:
    """Raise when a queue drains, or cannot hold those of these new tasks that are due."""
    due: Counter[str] = Counter()
    for submission in submissions:
        if not submission.parent_id:  # without its children a task there could not end
            due[submission.action.agent] += submission.is_due
    for agent, tasks in due.items():
        found = connection.execute(statements.admission(agent, limit, max(1, tasks))).one()
        if found.draining:
            raise _draining(agent)
        if found.is_full:
            raise QueueFull(
                f"The queue {agent} may hold {limit} due tasks, and has no room for "
                f"{max(1, tasks)} more; try again later."
            )


def _draining(agent: str) -> QueueDraining:
    return QueueDraining(
        f"The queue {agent} drains and takes no new tasks; `sutazai queue resume {agent}`."
    )


def _resolve_conflict(
    connection: Connection, submission: Submission
) -> tuple[Accepted | None, Sequence[lifecycle.Ended]]:
    """Do what `on_conflict` says about unfinished tasks of the same concurrency key.

    Returns the task that stands for this submission, if one does, and what was cancelled at once.
    """
    options = submission.options
    if not options.resolves_conflict or options.concurrency_key is None:
        return None, ()
    action = submission.action
    key = (action.agent, options.concurrency_key)
    # The lock keeps two submissions from both finding nothing.
    connection.execute(statements.lock_key(*key, action.key_slots, action.key_rate_per_s))
    # An equal request may have been accepted while the lock was waited for; its task is our own.
    known = _replay(connection, submission)
    if known is not None:
        return known, ()
    unfinished = connection.execute(statements.unfinished_of_key(*key)).scalars().all()
    if not unfinished:
        return None, ()
    if submission.task_id in unfinished:
        # It was accepted before, and its answer got lost.
        return Accepted(submission.task_id, fresh=False), ()
    match options.on_conflict:
        case "join":
            return _join(connection, submission, unfinished[-1]), ()
        case "replace":
            ended: list[lifecycle.Ended] = []
            for task_id in unfinished:
                ended += lifecycle.cancel(connection, task_id)
            return None, ended
        case _:
            raise KeyBusy(
                f"The task {unfinished[0]} with the concurrency key {options.concurrency_key!r} "
                "has not ended yet.",
                details=[str(task_id) for task_id in unfinished[:10]],
            )


def _join(connection: Connection, submission: Submission, task_id: UUID) -> Accepted:
    """Let an unfinished task stand for a submission, and for its key also when it has ended."""
    if submission.options.idempotency_key is not None:
        row = submission.row | {"task_id": task_id}
        connection.execute(statements.reserve_keys([row]))
    return Accepted(task_id, fresh=False)
