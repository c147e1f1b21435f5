"""Every SQL statement of the platform: one function a verb, which builds it and runs nothing.

Statements have no colour: fronts run them on an event loop, workers on a thread (db.py). The rules
they hold are those of docs/lifecycle.md. Time is always the database's (`now()`). Those that every
task passes through are `Ready`: text and values, which cost a fraction of an expression.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Delete,
    Insert,
    Select,
    Text,
    TextClause,
    Update,
    Uuid,
    and_,
    any_,
    case,
    cast,
    delete,
    exists,
    func,
    literal,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.sql import ColumnElement

from sutazai import payload
from sutazai.db import Ready
from sutazai.models import (
    IS_TERMINAL,
    attempts,
    idempotency_keys,
    queues,
    schedules,
    services,
    tasks,
    workers,
)
from sutazai.state import Outcome, State

LEASE_S = 30.0
"""How long a claim holds without being extended."""

FIRST_RING_S = 15.0
"""How long after a ring the row is rung again; it doubles each time up to `LAST_RING_S`."""

LAST_RING_S = 600.0

KEY_DAYS = 7
"""An idempotency key expires so many days after its task ended."""

DEPTH_LIMIT = 10_000
"""Counting of due tasks stops here; beyond it a depth is only known to be larger."""

WORKER_DEAD_S = 8.0
"""A worker whose heartbeat is older than this is dead for health (for rescue, the lease counts)."""

SERVICE_DEAD_S = 15.0
"""A relay or Beat whose heartbeat is older than this is dead."""

_NOW = func.now()
_QUEUED = tasks.c.state == State.QUEUED.value
_RUNNING = tasks.c.state == State.RUNNING.value
_NOTICE = (
    tasks.c.task_id,
    tasks.c.agent,
    tasks.c.action,
    tasks.c.priority,
    tasks.c.host,
    case((tasks.c.alone, None), else_=tasks.c.time_limit_s).label("time_limit_s"),
    func.left(cast(tasks.c.params, Text), 100).label("summary"),
    and_(
        tasks.c.host.is_(None),
        tasks.c.concurrency_key.is_(None),
        ~tasks.c.alone,
        tasks.c.rerun_after_crash,
        tasks.c.attempt == 0,  # what was put back once comes by itself
    ).label("is_plain"),
)


def _seconds(amount: float | ColumnElement[Any]) -> ColumnElement[Any]:
    """Return an interval of so many seconds."""
    return func.make_interval(0, 0, 0, 0, 0, 0, amount)


def _array(ids: Iterable[UUID]) -> str:
    """Return ids as PostgreSQL writes an array: the driver takes ten times as long for a list."""
    return "{" + ",".join(map(str, ids)) + "}"


_AFTER_RING = _seconds(
    func.least(LAST_RING_S, FIRST_RING_S * func.power(2.0, func.least(tasks.c.rings, 10)))
)
_LAST_RUNG_AT = tasks.c.next_ring_at - _seconds(
    func.least(LAST_RING_S, FIRST_RING_S * func.power(2.0, func.least(tasks.c.rings - 1, 10)))
)


# --- accept ---------------------------------------------------------------------------------


def accept(row: Mapping[str, Any], *, rung: bool) -> Ready:
    """Insert a task; a second one of the same parent's n-th call or the same tick does nothing.

    `rung`: whether the caller publishes a notice right after the commit. `deadline_in_s` in the
    row is a deadline by the database's clock. With an idempotency key nothing is inserted when the
    key is taken, and never while the queue drains. Returns the id if it was inserted.
    """
    values = {
        **_NO_OPTIONS,
        **row,
        "params": payload.dumps(row["params"]),
        "labels": payload.dumps(row.get("labels") or {}),
        "rings": int(rung),
        "ring_in_s": FIRST_RING_S if rung else 0.0,
    }
    if values["idempotency_key"] is None:
        return Ready(_ACCEPT, values)
    return Ready(_ACCEPT_ONCE, values)


_NO_OPTIONS: dict[str, Any] = dict.fromkeys(
    [
        *("run_at", "deadline_at", "deadline_in_s", "parent_id", "call_index", "retry_of"),
        *("scheduled_by", "tick_at", "host", "idempotency_key", "concurrency_key", "callback_url"),
    ]
)

_INSERT = """
    INSERT INTO tasks (
        task_id, agent, action, params, priority, max_attempts, time_limit_s, rerun_after_crash,
        source, labels, parent_id, call_index, retry_of, scheduled_by, tick_at, host,
        idempotency_key, concurrency_key, callback_url, run_at, deadline_at, rings, next_ring_at
    )
"""

_ADMITTED = """
    SELECT
        :task_id, :agent, :action, CAST(:params AS jsonb), :priority, :max_attempts,
        :time_limit_s, :rerun_after_crash, :source, CAST(:labels AS jsonb),
        CAST(:parent_id AS uuid), CAST(:call_index AS integer), CAST(:retry_of AS uuid),
        CAST(:scheduled_by AS text), CAST(:tick_at AS timestamptz), CAST(:host AS text),
        CAST(:idempotency_key AS text), CAST(:concurrency_key AS text),
        CAST(:callback_url AS text),
        coalesce(CAST(:run_at AS timestamptz), now()),
        coalesce(
            CAST(:deadline_at AS timestamptz),
            now() + make_interval(secs => CAST(:deadline_in_s AS float8))),
        :rings,
        CASE WHEN coalesce(CAST(:run_at AS timestamptz), now()) <= now()
             THEN now() + make_interval(secs => :ring_in_s) END
    WHERE (CAST(:parent_id AS uuid) IS NOT NULL
           OR NOT EXISTS (SELECT 1 FROM queues WHERE queues.agent = :agent AND draining))
"""

_ACCEPT = text(f"{_INSERT} {_ADMITTED} ON CONFLICT DO NOTHING RETURNING task_id")

_ACCEPT_ONCE = text(
    f"""
    WITH reserved AS (
        INSERT INTO idempotency_keys (principal, agent, key, task_id, fingerprint)
        SELECT :principal, :agent, :idempotency_key, :task_id, :fingerprint
        WHERE NOT EXISTS (SELECT 1 FROM queues WHERE queues.agent = :agent AND draining)
        ON CONFLICT DO NOTHING RETURNING task_id
    )
    {_INSERT} {_ADMITTED} AND EXISTS (SELECT 1 FROM reserved)
    ON CONFLICT DO NOTHING RETURNING task_id
    """  # noqa: S608 - the inserted texts are constants
)


def accept_many(rows: Sequence[Mapping[str, Any]], *, rung: Collection[UUID] = ()) -> Ready:
    """Insert many tasks at once, without idempotency keys of their own, as `accept` does.

    `rung`: the ids of those for which the caller publishes a notice right after the commit.
    Returns the ids of those that were inserted.
    """
    # What a row leaves out is null.
    told = (
        [{**row, "rings": 1} if row["task_id"] in rung else row for row in rows] if rung else rows
    )
    return Ready(_ACCEPT_MANY, {"rows": payload.dumps(told), "first_ring_s": FIRST_RING_S})


_ACCEPT_MANY = text(
    f"""
    {_INSERT}
    SELECT
        r.task_id, r.agent, r.action, r.params, r.priority, r.max_attempts, r.time_limit_s,
        r.rerun_after_crash, r.source, coalesce(r.labels, '{{}}'), r.parent_id, r.call_index,
        r.retry_of,
        r.scheduled_by, r.tick_at, r.host, r.idempotency_key, r.concurrency_key, r.callback_url,
        coalesce(r.run_at, now()),
        coalesce(r.deadline_at, now() + make_interval(secs => r.deadline_in_s)),
        coalesce(r.rings, 0),
        CASE WHEN coalesce(r.run_at, now()) <= now()
             THEN now() + make_interval(secs => coalesce(r.rings, 0) * :first_ring_s) END
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS r(
        task_id uuid, agent text, action text, params jsonb, priority smallint,
        max_attempts integer, time_limit_s float8, rerun_after_crash boolean, source text,
        labels jsonb, parent_id uuid, call_index integer, retry_of uuid, scheduled_by text,
        tick_at timestamptz, host text, idempotency_key text, concurrency_key text,
        callback_url text, run_at timestamptz, deadline_at timestamptz, deadline_in_s float8,
        rings integer
    )
    WHERE NOT EXISTS (SELECT 1 FROM queues WHERE queues.agent = r.agent AND draining)
    ON CONFLICT DO NOTHING
    RETURNING task_id
    """  # noqa: S608 - the inserted text is a constant
)


def reserve_keys(rows: Sequence[Mapping[str, Any]]) -> TextClause:
    """Take the idempotency keys of many tasks, in the order of the keys; return whose were free.

    In one order, so that two groups that share keys wait for each other instead of deadlocking.
    """
    names = ("principal", "agent", "idempotency_key", "task_id", "fingerprint")
    keys = [{name: row[name] for name in names} for row in rows]
    return _RESERVE_KEYS.bindparams(keys=payload.dumps(keys))


_RESERVE_KEYS = text(
    """
    INSERT INTO idempotency_keys (principal, agent, key, task_id, fingerprint)
    SELECT r.principal, r.agent, r.idempotency_key, r.task_id, r.fingerprint
    FROM jsonb_to_recordset(CAST(:keys AS jsonb)) AS r(
        principal text, agent text, idempotency_key text, task_id uuid, fingerprint text)
    ORDER BY r.principal, r.agent, r.idempotency_key
    ON CONFLICT DO NOTHING
    RETURNING task_id
    """
)


def keyed(principal: str, agent: str, key: str) -> TextClause:
    """Return the task of an idempotency key, and whether the key has expired."""
    return _KEYED.bindparams(principal=principal, agent=agent, key=key, days=KEY_DAYS)


_KEYED = text(
    """
    SELECT k.task_id, k.fingerprint, t.state,
           t.task_id IS NULL OR coalesce(
               t.finished_at < now() - make_interval(days => :days), false) AS expired
    FROM idempotency_keys k LEFT JOIN tasks t ON t.task_id = k.task_id
    WHERE k.principal = :principal AND k.agent = :agent AND k.key = :key
    """
)


def forget_key(principal: str, agent: str, key: str, task_id: UUID) -> Delete:
    """Free an expired idempotency key, unless somebody else has taken it again meanwhile."""
    keys = idempotency_keys.c
    return delete(idempotency_keys).where(
        keys.principal == principal, keys.agent == agent, keys.key == key, keys.task_id == task_id
    )


def admission(agent: str, limit: int | None, tasks: int = 1) -> TextClause:
    """Return whether an agent's queue drains, and whether so many more tasks exceed the limit."""
    return _ADMISSION.bindparams(agent=agent, left=None if limit is None else limit - tasks)


_ADMISSION = text(
    """
    SELECT EXISTS (SELECT 1 FROM queues WHERE queues.agent = :agent AND draining) AS draining,
           CAST(:left AS bigint) IS NOT NULL AND (CAST(:left AS bigint) < 0 OR EXISTS (
               SELECT 1 FROM tasks
               WHERE agent = :agent AND state = 'queued' AND next_ring_at IS NOT NULL
               OFFSET greatest(CAST(:left AS bigint), 0) LIMIT 1)) AS is_full
    """
)


# --- concurrency keys -----------------------------------------------------------------------


def lock_key(agent: str, key: str, slots: int = 1, rate_per_s: float | None = None) -> TextClause:
    """Lock a concurrency key until the transaction ends; return whether its rate admits a start.

    The rate is GCRA (ITU-T I.371) with a tolerance of two seconds.
    """
    return _LOCK_KEY.bindparams(agent=agent, key=key, slots=slots, rate_per_s=rate_per_s)


_LOCK_KEY = text(
    """
    INSERT INTO concurrency_keys AS k (agent, key, slots, rate_per_s)
    VALUES (:agent, :key, :slots, CAST(:rate_per_s AS float8))
    ON CONFLICT (agent, key) DO UPDATE
        SET slots = excluded.slots, rate_per_s = excluded.rate_per_s
    RETURNING k.rate_per_s IS NULL OR k.next_at IS NULL OR k.next_at <= clock_timestamp()
        + make_interval(secs => greatest(0, 2 - 1 / k.rate_per_s)) AS is_open
    """
)


def lock_key_of(agent: str, key: str) -> TextClause:
    """Lock a concurrency key that some claim has made."""
    return _LOCK_KEY_OF.bindparams(agent=agent, key=key)


_LOCK_KEY_OF = text("SELECT 1 FROM concurrency_keys WHERE agent = :agent AND key = :key FOR UPDATE")


def start_of_key(agent: str, key: str) -> TextClause:
    """Record that a task of a key with a rate starts now."""
    return _START_OF_KEY.bindparams(agent=agent, key=key)


_START_OF_KEY = text(
    """
    UPDATE concurrency_keys
    SET next_at = greatest(next_at, clock_timestamp()) + make_interval(secs => 1 / rate_per_s)
    WHERE agent = :agent AND key = :key AND rate_per_s IS NOT NULL
    """
)


def running_of_key(agent: str, key: str) -> Select[Any]:
    """Count the running tasks of a concurrency key, whose lock the caller holds."""
    return (
        select(func.count())
        .select_from(tasks)
        .where(_RUNNING, tasks.c.agent == agent, tasks.c.concurrency_key == key)
    )


def unfinished_of_key(agent: str, key: str) -> Select[Any]:
    """Return the unfinished tasks of a concurrency key, oldest first."""
    return (
        select(tasks.c.task_id)
        .where(
            tasks.c.agent == agent,
            tasks.c.concurrency_key == key,
            tasks.c.finished_at.is_(None),
        )
        .order_by(tasks.c.task_id)
    )


def hold(task_id: UUID) -> Update:
    """Keep a due task from being rung until its concurrency key has room."""
    return (
        update(tasks)
        .where(tasks.c.task_id == task_id, _QUEUED)
        .values(held=True, rings=0, next_ring_at=None)
    )


def wake_key(agent: str, key: str) -> TextClause:
    """Let as many held tasks of a key be rung as it has room for: priority, then age."""
    return _WAKE_KEY.bindparams(agent=agent, key=key)


def wake_keys() -> TextClause:
    """Do the same for every key that has held tasks."""
    return _WAKE_KEYS


_WAKE = """
    WITH woken AS (
        SELECT w.task_id FROM concurrency_keys k
        CROSS JOIN LATERAL (
            SELECT t.task_id FROM tasks t
            WHERE t.agent = k.agent AND t.concurrency_key = k.key AND t.state = 'queued' AND t.held
            ORDER BY t.priority DESC, t.task_id
            LIMIT greatest(0, k.slots - (
                SELECT count(*) FROM tasks o
                WHERE o.agent = k.agent AND o.concurrency_key = k.key AND o.finished_at IS NULL
                  AND (o.state = 'running' OR o.state = 'queued' AND o.next_ring_at IS NOT NULL)))
        ) AS w
        WHERE {which}
          AND (k.rate_per_s IS NULL OR k.next_at IS NULL OR k.next_at <= clock_timestamp()
               + make_interval(secs => greatest(0, 2 - 1 / k.rate_per_s)))
    )
    UPDATE tasks SET held = false, rings = 0, next_ring_at = now()
    FROM woken WHERE tasks.task_id = woken.task_id AND tasks.state = 'queued' AND tasks.held
    RETURNING tasks.task_id
"""

_WAKE_KEY = text(_WAKE.format(which="k.agent = :agent AND k.key = :key"))

_WAKE_KEYS = text(
    _WAKE.format(
        which="""(k.agent, k.key) IN (
            SELECT DISTINCT agent, concurrency_key FROM tasks WHERE state = 'queued' AND held)"""
    )
)


def child_of(parent_id: UUID, call_index: int) -> Select[Any]:
    """Find the child that a parent's n-th call made."""
    return select(tasks.c.task_id).where(
        tasks.c.parent_id == parent_id, tasks.c.call_index == call_index
    )


# --- replay ---------------------------------------------------------------------------------


def lock_replay(agent: str) -> TextClause:
    """Let one bulk replay of an agent's tasks follow the other, until the transaction ends."""
    return text("SELECT pg_advisory_xact_lock(hashtext('replay'), hashtext(:agent))").bindparams(
        agent=agent
    )


def allow(within_s: float) -> TextClause:
    """Let each statement take so long, until the transaction ends."""
    return text("SELECT set_config('statement_timeout', :limit, true)").bindparams(
        limit=f"{round(within_s * 1000)}ms"
    )


def now() -> TextClause:
    """Return the database's time."""
    return text("SELECT now()")


def replayable(
    *,
    agent: str,
    state: str,
    limit: int,
    action: str | None = None,
    code: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    labels: Mapping[str, str] | None = None,
) -> TextClause:
    """Return ended tasks that were not retried yet, oldest first.

    Not those to which their parent had delegated its work: it would start them again itself.
    """
    values = _given(
        limit=limit, agent=agent, action=action, code=code, since=since, until=until, labels=labels
    )
    if "code" in values:  # for which there is an index of its own
        known, which = _GIVEN_AGENT, _fitting(values, action="action = :action")
    else:
        known, which = _known_actions(values), "AND action = known.action"
    more = which + _fitting(
        values,
        code="error ->> 'code' = :code",
        since="finished_at >= :since",
        until="finished_at < :until",
        labels=_HAS_LABELS,
    )
    return text(_REPLAYABLE.format(known=known, state=State(state), more=more)).bindparams(**values)


# The state as text, so that every plan may use the index of what has failed or was cancelled.
_REPLAYABLE = """
    SELECT oldest.* FROM ({known}) AS known CROSS JOIN LATERAL (
        SELECT task_id, agent, action, params, priority, max_attempts, time_limit_s, labels,
               concurrency_key, callback_url, host, created_at
        FROM tasks AS t
        WHERE agent = known.agent AND state = '{state}' {more}
          AND NOT EXISTS (SELECT 1 FROM tasks AS again WHERE again.retry_of = t.task_id)
          AND NOT EXISTS (
              SELECT 1 FROM tasks AS parent
              WHERE parent.task_id = t.parent_id AND parent.child_id = t.task_id)
        ORDER BY created_at, task_id LIMIT :limit) AS oldest
    ORDER BY created_at, task_id LIMIT :limit
"""


# --- ring -----------------------------------------------------------------------------------


def ring_unrung(agent: str, limit: int, priorities: Collection[int] = range(10)) -> Update:
    """Take the next rows of a queue that were never rung: priority, then age."""
    chosen = (
        select(tasks.c.task_id)
        .where(
            _QUEUED,
            tasks.c.agent == agent,
            tasks.c.rings == 0,
            tasks.c.priority.in_(priorities),
            tasks.c.next_ring_at.is_not(None),
            tasks.c.next_ring_at <= _NOW,
        )
        .order_by(tasks.c.priority.desc(), tasks.c.task_id)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("chosen")
    )
    return _ring(chosen)


def ring_overdue(agent: str, limit: int, *, empty: Collection[int] = ()) -> Update:
    """Take rows of a queue whose notice brought no claim.

    empty: priorities of which nothing lies on the broker's queue. Their notices are certainly gone,
    so back-off does not count; but it does for a host whose worker is dead: nobody takes notices
    from that one's own queue.
    """
    overdue: ColumnElement[bool] = tasks.c.next_ring_at <= _NOW
    if empty:
        is_gone = and_(
            tasks.c.priority.in_(empty),
            _NOW - _seconds(FIRST_RING_S) >= _LAST_RUNG_AT,
            or_(tasks.c.host.is_(None), tasks.c.host.in_(live_hosts(agent))),
        )
        overdue = or_(overdue, is_gone)
    chosen = (
        select(tasks.c.task_id)
        .where(_QUEUED, tasks.c.agent == agent, tasks.c.rings > 0, overdue)
        .order_by(tasks.c.next_ring_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("chosen")
    )
    return _ring(chosen)


def _ring(chosen: Any) -> Update:
    return (
        update(tasks)
        .where(tasks.c.task_id.in_(select(chosen.c.task_id)))
        .values(rings=tasks.c.rings + 1, next_ring_at=_NOW + _AFTER_RING)
        .returning(*_NOTICE)
    )


def ring_failed(task_ids: Sequence[UUID], *, after_s: float = 1.0) -> Update:
    """Make rows due whose notice was not published, or lost; without doubling."""
    return (
        update(tasks)
        .where(_QUEUED, tasks.c.task_id.in_(task_ids), tasks.c.rings > 0)
        .values(rings=tasks.c.rings - 1, next_ring_at=_NOW + _seconds(after_s))
    )


def count_rung(agent: str) -> TextClause:
    """Count the notices of a queue that are out, by priority."""
    return _COUNT_RUNG.bindparams(agent=agent)


_COUNT_RUNG = text(
    """
    SELECT priority, count(*) AS notices FROM tasks
    WHERE agent = :agent AND state = 'queued' AND rings > 0 GROUP BY priority
    """
)


PUT_OFF_S = 1.0


def put_off(task_id: UUID) -> Update:
    """Ring a task again in a second, which could not be claimed just now."""
    return (
        update(tasks)
        .where(_QUEUED, tasks.c.task_id == task_id)
        .values(next_ring_at=_NOW + _seconds(PUT_OFF_S))
    )


def ring_again(agent: str | None = None) -> TextClause:
    """Make rows due that were rung, of one agent or of all: their notices are lost.

    The broker lost its queues, a worker died with what it held, or a crash of PostgreSQL forgot
    claims. What somebody works on just now is left out.
    """
    return _RING_AGAIN.bindparams(agent=agent)


def ring_children(parent_ids: Sequence[UUID]) -> Ready:
    """Do the same for unfinished children, whose notices died with their parents' process."""
    return Ready(_RING_CHILDREN, {"parent_ids": _array(parent_ids)})


def ring_put_off(agent: str) -> Ready:
    """Do the same for what was put off, now that nothing must be alone any more."""
    return Ready(_RING_PUT_OFF, {"agent": agent, "within_s": PUT_OFF_S})


def ring_afresh(agent: str) -> Ready:
    """Take an agent's rows for never rung: their notices came while the queue was paused.

    So they take their turn by priority and age, not behind what was never rung.
    """
    return Ready(_RING_AFRESH, {"agent": agent})


def _rung(which: str, also: str = "") -> TextClause:
    # An array, because with a join the planner reads all of history.
    return text(
        f"""
        UPDATE tasks SET next_ring_at = now(){also}
        WHERE task_id = ANY(ARRAY(
            SELECT task_id FROM tasks
            WHERE state = 'queued' AND rings > 0 AND {which}
            FOR UPDATE SKIP LOCKED))
        """  # noqa: S608 - the inserted texts are constants
    )


_RING_AGAIN = _rung("(CAST(:agent AS text) IS NULL OR agent = :agent)")
_RING_AFRESH = _rung("agent = :agent", also=", rings = 0")
# The second is what the index of children wants to hear.
_RING_CHILDREN = _rung("parent_id = ANY(CAST(:parent_ids AS uuid[])) AND finished_at IS NULL")
_RING_PUT_OFF = _rung("agent = :agent AND next_ring_at < now() + make_interval(secs => :within_s)")


@cache
def become_due(limit: int) -> TextClause:
    """Let rows whose time has come be rung."""
    return _BECOME_DUE.bindparams(limit=limit)


_BECOME_DUE = text(
    """
    UPDATE tasks SET rings = 0, next_ring_at = now()
    WHERE task_id = ANY(ARRAY(
        SELECT task_id FROM tasks
        WHERE state = 'queued' AND next_ring_at IS NULL AND NOT held AND run_at <= now()
        ORDER BY run_at LIMIT :limit FOR UPDATE SKIP LOCKED))
    """
)


# --- claim, extend --------------------------------------------------------------------------


def claim(task_id: UUID, **claimant: Any) -> Ready:
    """Start an attempt, if the task is due here; no row: a stale, doubled or foreign notice.

    claimant: agent, action, claim_id, worker, worker_id, host. A task with a concurrency key is
    claimed by `claim_of_key`. Beside a suspect, a task that has seen its worker or its process die,
    nothing is started on the same worker.
    """
    return Ready(_CLAIM, {"task_id": task_id, "lease_s": LEASE_S, **claimant})


def claim_of_key(task_id: UUID, **claimant: Any) -> Ready:
    """Do the same as `claim` for a task whose concurrency key the caller has locked."""
    return Ready(_CLAIM_OF_KEY, {"task_id": task_id, "lease_s": LEASE_S, **claimant})


def claim_many(claims: Mapping[UUID, UUID], **claimant: Any) -> Ready:
    """Do the same as `claim` for several tasks, given with the ids of their claims.

    Only plain ones are claimed: without key or host, never crashed, and allowed to run again. What
    somebody else works on is left out.
    """
    ids = {"task_ids": _array(claims), "claim_ids": _array(claims.values())}
    return Ready(_CLAIM_MANY, {**ids, "lease_s": LEASE_S, **claimant})


_CLAIM_VALUES = """
        state = 'running', attempt = attempt + 1, worker = :worker, worker_id = :worker_id,
        started_at = now(), next_ring_at = NULL, held = false,
        lease_expires_at = now() + make_interval(secs => :lease_s)
"""

_CLAIMABLE_HERE = """
    agent = :agent AND action = :action AND state = 'queued' AND run_at <= now()
      AND (deadline_at IS NULL OR deadline_at > now())
      AND (host IS NULL OR host = :host)
      AND cancel_requested_at IS NULL
      AND NOT EXISTS (SELECT 1 FROM queues WHERE queues.agent = :agent AND paused)
      AND NOT EXISTS (SELECT 1 FROM tasks s
                      WHERE s.worker_id = :worker_id AND s.state = 'running' AND s.alone)
"""

_CLAIMED_COLUMNS = """task_id, action, params, attempt, failures, max_attempts, time_limit_s,
    created_at, deadline_at, parent_id, concurrency_key, alone"""

_CLAIM_ONE = f"""
    UPDATE tasks SET {_CLAIM_VALUES}, claim_id = :claim_id
    WHERE task_id = :task_id AND {_CLAIMABLE_HERE} AND concurrency_key IS {{keyed}} NULL
    RETURNING {_CLAIMED_COLUMNS}, set_config('synchronous_commit', 'off', true)
"""  # noqa: S608 - the inserted texts are constants

_CLAIM = text(_CLAIM_ONE.format(keyed=""))
_CLAIM_OF_KEY = text(_CLAIM_ONE.format(keyed="NOT"))
# An array, because with a join the planner may read all of history.
_CLAIM_MANY = text(
    f"""
    UPDATE tasks SET {_CLAIM_VALUES},
        claim_id = (CAST(:claim_ids AS uuid[]))[
            array_position(CAST(:task_ids AS uuid[]), task_id)]
    WHERE task_id = ANY(ARRAY(
        SELECT task_id FROM tasks
        WHERE task_id = ANY(CAST(:task_ids AS uuid[])) AND {_CLAIMABLE_HERE}
          AND concurrency_key IS NULL AND host IS NULL AND NOT alone AND rerun_after_crash
        FOR UPDATE SKIP LOCKED))
    RETURNING {_CLAIMED_COLUMNS}, set_config('synchronous_commit', 'off', true)
    """  # noqa: S608 - the inserted texts are constants
)
# A claim that a crash of PostgreSQL forgets leaves the task queued, and its attempt's outcome is
# refused by the fence: so, unlike accept and finish, a claim need not wait for the disk.


def claimed(claims: Mapping[UUID, UUID]) -> Ready:
    """Return what claims have returned whose answer got lost; no row: that one does not hold."""
    return Ready(_CLAIMED, {"task_ids": _array(claims), "claim_ids": _array(claims.values())})


_CLAIMED = text(
    f"""
    SELECT {_CLAIMED_COLUMNS} FROM tasks
    WHERE task_id = ANY(CAST(:task_ids AS uuid[])) AND claim_id = ANY(CAST(:claim_ids AS uuid[]))
      AND state = 'running'
    """  # noqa: S608 - of our own constants
)


def unclaimed(task_id: UUID, worker_id: UUID) -> TextClause:
    """Return what kept a queued task from being claimed; no row: it is not queued."""
    return _UNCLAIMED.bindparams(task_id=task_id, worker_id=worker_id)


_UNCLAIMED = text(
    """
    SELECT agent, concurrency_key,
           EXISTS (SELECT 1 FROM tasks s
                   WHERE s.worker_id = :worker_id AND s.state = 'running' AND s.alone)
           AS beside_suspect
    FROM tasks WHERE task_id = :task_id AND state = 'queued' AND NOT held
    """
)


def neighbours(task_id: UUID, worker_id: UUID) -> TextClause:
    """Count what runs on a worker beside a task that must run alone.

    Of two such tasks that started at the same instant the older one goes first.
    """
    return _BESIDE.bindparams(task_id=task_id, worker_id=worker_id)


_BESIDE = text(
    """
    SELECT count(*) FROM tasks
    WHERE worker_id = :worker_id AND state = 'running' AND task_id <> :task_id
      AND (NOT alone OR task_id < :task_id)
    """
)


def extend(claims: Sequence[tuple[UUID, UUID]]) -> Ready:
    """Extend the leases of running (task, claim) pairs; a pair not returned has lost its task.

    One that is being ended just now, and so is locked, is returned and left as it is: whoever waits
    for one row while he holds another may deadlock with those who end several.
    """
    task_ids, claim_ids = zip(*claims, strict=True)
    ids = {"task_ids": _array(task_ids), "claim_ids": _array(claim_ids)}
    return Ready(_EXTEND, {**ids, "lease_s": LEASE_S})


_EXTEND = text(
    """
    WITH own AS (
        SELECT task_id, claim_id, cancel_requested_at FROM tasks
        WHERE task_id = ANY(CAST(:task_ids AS uuid[]))
          AND claim_id = ANY(CAST(:claim_ids AS uuid[])) AND state = 'running'
    ), extended AS (
        UPDATE tasks SET lease_expires_at = now() + make_interval(secs => :lease_s)
        WHERE task_id = ANY(ARRAY(
            SELECT task_id FROM tasks
            WHERE task_id = ANY(CAST(:task_ids AS uuid[]))
              AND claim_id = ANY(CAST(:claim_ids AS uuid[])) AND state = 'running'
            FOR UPDATE SKIP LOCKED))
    )
    SELECT * FROM own
    """
)


def progress(task_id: UUID, claim_id: UUID, fraction: float, message: str) -> TextClause:
    """Record how far a running task has come, and tell it as an event."""
    told = payload.dumps({"fraction": fraction, "message": message})
    return _PROGRESS.bindparams(task_id=task_id, claim_id=claim_id, told=told)


# Ids of events grow with time; the last three digits are the place within one commit.
_EVENT_ID = "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint) * 1000"

_PROGRESS = text(
    f"""
    WITH current AS (
        UPDATE tasks SET progress = CAST(:told AS jsonb)
        WHERE task_id = :task_id AND claim_id = :claim_id AND state = 'running'
        RETURNING task_id, cancel_requested_at
    ), told AS (
        INSERT INTO task_events (task_id, event_id, kind, data)
        SELECT task_id, {_EVENT_ID}, 'progress', CAST(:told AS jsonb) FROM current
    )
    SELECT cancel_requested_at FROM current
    """  # noqa: S608 - the inserted text is a constant
)


def tell_lines(task_id: UUID, claim_id: UUID, lines: Sequence[Mapping[str, Any]]) -> TextClause:
    """Store log lines of a running task, at most a thousand, as events."""
    return _TELL_LINES.bindparams(
        task_id=task_id, claim_id=claim_id, lines=payload.dumps(list(lines))
    )


_TELL_LINES = text(
    f"""
    INSERT INTO task_events (task_id, event_id, kind, data)
    SELECT t.task_id, {_EVENT_ID} + line.place - 1, 'log', line.data
    FROM tasks t,
         jsonb_array_elements(CAST(:lines AS jsonb)) WITH ORDINALITY AS line(data, place)
    WHERE t.task_id = :task_id AND t.claim_id = :claim_id AND t.state = 'running'
    """  # noqa: S608 - the inserted text is a constant
)


def told_lines(task_id: UUID) -> TextClause:
    """Return how many log lines of a task are stored, and their size in bytes."""
    return _TOLD_LINES.bindparams(task_id=task_id)


_TOLD_LINES = text(
    """
    SELECT count(*) AS lines, coalesce(sum(octet_length(CAST(data AS text))), 0) AS bytes
    FROM task_events WHERE task_id = :task_id AND kind = 'log'
    """
)


def cancellation(task_id: UUID, claim_id: UUID) -> Select[Any]:
    """Return a row when this attempt is still wanted, with when it was asked to cancel."""
    return select(tasks.c.cancel_requested_at).where(
        tasks.c.task_id == task_id, tasks.c.claim_id == claim_id, _RUNNING
    )


# --- the ways out of running ----------------------------------------------------------------


def lock(task_ids: Sequence[UUID], *, skip_locked: bool = False) -> Select[Any]:
    """Lock tasks in the order of their ids, and return those that are locked."""
    return (
        select(tasks.c.task_id)
        .where(tasks.c.task_id == any_(literal(list(task_ids), ARRAY(Uuid))))
        .order_by(tasks.c.task_id)
        .with_for_update(skip_locked=skip_locked)
    )


def family_of(task_id: UUID) -> TextClause:
    """Return a task, the unfinished children of it if it waits, theirs if they wait, and so on.

    The deepest come first.
    """
    return _FAMILY_OF.bindparams(task_id=task_id)


_FAMILY_OF = text(
    """
    WITH RECURSIVE family AS (
        SELECT task_id, parent_id, child_id, state, 0 AS depth FROM tasks WHERE task_id = :task_id
        UNION ALL
        SELECT t.task_id, t.parent_id, t.child_id, t.state, family.depth + 1
        FROM family JOIN tasks t ON t.parent_id = family.task_id
        WHERE family.state = 'waiting' AND t.finished_at IS NULL
    )
    SELECT task_id, parent_id, child_id, state FROM family ORDER BY depth DESC, task_id
    """
)


def finish(
    task_id: UUID,
    claim_id: UUID,
    state: State,
    outcome: Outcome,
    *,
    result: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
) -> Ready:
    """Make a running task terminal; no row: this attempt has lost its lease."""
    values = {
        "task_id": task_id,
        "claim_id": claim_id,
        "state": state.value,
        "outcome": outcome.value,
        "result": None if result is None else payload.dumps(result),
        "error": None if error is None else payload.dumps(error),
        "failures": int(outcome in (Outcome.FAILED, Outcome.TIMED_OUT)),
        "crashes": int(outcome is Outcome.LOST),
    }
    return Ready(_FINISH, values)


_FINISH = text(
    """
    WITH ended AS (
        UPDATE tasks SET
            state = :state, finished_at = now(), lease_expires_at = NULL,
            result = CAST(:result AS jsonb), error = CAST(:error AS jsonb),
            failures = failures + :failures, crashes = crashes + :crashes
        WHERE task_id = :task_id AND claim_id = :claim_id AND state = 'running'
        RETURNING task_id, agent, concurrency_key, attempt, claim_id, worker, started_at
    ), recorded AS (
        INSERT INTO attempts (task_id, attempt, claim_id, worker, started_at, outcome, error)
        SELECT task_id, attempt, claim_id, worker, started_at, :outcome, CAST(:error AS jsonb)
        FROM ended
    )
    SELECT task_id, CAST(:state AS text) AS state FROM ended
    """
)


class Ending(NamedTuple):
    """How an attempt ended that is recorded together with others."""

    task_id: UUID
    claim_id: UUID
    state: State
    outcome: Outcome
    began_at: float
    ended_at: float
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None


def finish_many(endings: Sequence[Ending], now: float) -> Ready:
    """Do the same as `finish` for several attempts that ended one after the other a moment ago.

    now: the instant, by the clock of the endings' own.
    """
    rows = [
        {
            "task_id": ending.task_id,
            "claim_id": ending.claim_id,
            "state": ending.state,
            "outcome": ending.outcome,
            "result": ending.result,
            "error": ending.error,
            "failures": int(ending.outcome is Outcome.FAILED),
            "began_ago_s": now - ending.began_at,
            "ended_ago_s": now - ending.ended_at,
        }
        for ending in endings
    ]
    task_ids = _array(ending.task_id for ending in endings)
    return Ready(_FINISH_MANY, {"task_ids": task_ids, "rows": payload.dumps(rows)})


_FINISH_MANY = text(
    """
    WITH given AS (
        SELECT * FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS r(
            task_id uuid, claim_id uuid, state text, outcome text, result jsonb, error jsonb,
            failures integer, began_ago_s float8, ended_ago_s float8)
    ), ended AS (
        UPDATE tasks t SET
            state = g.state, lease_expires_at = NULL, result = g.result, error = g.error,
            started_at = greatest(t.started_at, now() - make_interval(secs => g.began_ago_s)),
            finished_at = greatest(t.started_at, now() - make_interval(secs => g.ended_ago_s)),
            failures = t.failures + g.failures
        FROM given g
        WHERE t.task_id = ANY(CAST(:task_ids AS uuid[]))
          AND t.task_id = g.task_id AND t.claim_id = g.claim_id AND t.state = 'running'
        RETURNING t.task_id, t.attempt, t.claim_id, t.worker, t.started_at, t.finished_at,
                  t.state, t.error, g.outcome
    ), recorded AS (
        INSERT INTO attempts (
            task_id, attempt, claim_id, worker, started_at, ended_at, outcome, error)
        SELECT task_id, attempt, claim_id, worker, started_at, finished_at, outcome, error
        FROM ended
    )
    SELECT task_id, state FROM ended
    """
)


def requeue(
    task_id: UUID,
    claim_id: UUID,
    outcome: Outcome,
    *,
    delay_s: float = 0.0,
    failures: int = 0,
    crashes: int = 0,
    alone: bool = False,
    error: Mapping[str, Any] | None = None,
) -> Select[Any]:
    """Put a running task back: retry, drain and rescue. One that was cancelled ends instead.

    alone: from now on it is a suspect, and runs beside nothing else.
    """
    cancelled = tasks.c.cancel_requested_at.is_not(None)
    run_at = _NOW + _seconds(delay_s) if delay_s > 0 else _NOW
    return _leave(
        task_id,
        claim_id,
        outcome,
        error,
        state=case((cancelled, State.CANCELLED.value), else_=State.QUEUED.value),
        finished_at=case((cancelled, _NOW), else_=None),
        error=case((cancelled, literal(CANCELLED, JSONB)), else_=tasks.c.error),
        run_at=case((cancelled, tasks.c.run_at), else_=run_at),
        rings=0,
        next_ring_at=None if delay_s > 0 else case((cancelled, None), else_=_NOW),
        failures=tasks.c.failures + failures,
        crashes=tasks.c.crashes + crashes,
        alone=or_(tasks.c.alone, literal(alone)),
    )


def wait_for_child(task_id: UUID, claim_id: UUID, child_id: UUID) -> Select[Any]:
    """End this attempt; the task will end as its child does."""
    return _leave(
        task_id,
        claim_id,
        Outcome.DELEGATED,
        None,
        state=State.WAITING.value,
        child_id=child_id,
    )


CANCELLED = {"code": "task_cancelled", "message": "The task was cancelled.", "retryable": False}


def _leave(
    task_id: UUID,
    claim_id: UUID,
    outcome: Outcome,
    attempt_error: Mapping[str, Any] | None,
    **values: Any,
) -> Select[Any]:
    """Move a task out of running under its claim, and write the attempt's row with it."""
    left = (
        update(tasks)
        .where(tasks.c.task_id == task_id, tasks.c.claim_id == claim_id, _RUNNING)
        .values(lease_expires_at=None, **values)
        .returning(
            tasks.c.task_id,
            tasks.c.state,
            tasks.c.attempt,
            tasks.c.claim_id,
            tasks.c.worker,
            tasks.c.started_at,
        )
        .cte("ended")
    )
    recorded = (
        insert(attempts)
        .from_select(
            ["task_id", "attempt", "claim_id", "worker", "started_at", "outcome", "error"],
            select(
                left.c.task_id,
                left.c.attempt,
                left.c.claim_id,
                left.c.worker,
                left.c.started_at,
                literal(outcome.value),
                literal(attempt_error, JSONB(none_as_null=True)),
            ),
        )
        .cte("recorded")
    )
    return select(left.c.state).add_cte(recorded)


def charge(task_id: UUID) -> Select[Any]:
    """Return what decides whether a task is tried again, and what is locked before it."""
    return select(
        tasks.c.task_id,
        tasks.c.claim_id,
        tasks.c.agent,
        tasks.c.action,
        tasks.c.parent_id,
        tasks.c.concurrency_key,
        tasks.c.failures,
        tasks.c.max_attempts,
        tasks.c.rerun_after_crash,
    ).where(tasks.c.task_id == task_id)


def outcome_of(task_id: UUID, claim_id: UUID) -> Select[Any]:
    """Return the state that an attempt left, to learn what an uncertain commit did."""
    return (
        select(tasks.c.state, attempts.c.outcome)
        .join(attempts, attempts.c.task_id == tasks.c.task_id)
        .where(tasks.c.task_id == task_id, attempts.c.claim_id == claim_id)
    )


def outcomes_of(endings: Sequence[Ending]) -> Ready:
    """Return the states that attempts have left, to learn what an uncertain commit did."""
    return Ready(
        _OUTCOMES_OF,
        {
            "claim_ids": _array(ending.claim_id for ending in endings),
            "task_ids": _array(ending.task_id for ending in endings),
        },
    )


_OUTCOMES_OF = text(
    """
    SELECT t.task_id, t.state FROM tasks t
    WHERE t.task_id = ANY(CAST(:task_ids AS uuid[])) AND EXISTS (
        SELECT 1 FROM attempts a
        WHERE a.task_id = t.task_id AND a.claim_id = ANY(CAST(:claim_ids AS uuid[])))
    """
)


def end_queued(task_ids: Sequence[UUID], state: State, error: Mapping[str, Any]) -> Update:
    """Make queued tasks terminal that will not run."""
    return (
        update(tasks)
        .where(tasks.c.task_id.in_(task_ids), _QUEUED)
        .values(state=state.value, error=error, finished_at=_NOW, next_ring_at=None)
        .returning(tasks.c.task_id, tasks.c.agent, tasks.c.parent_id)
    )


def cancel(task_ids: Sequence[UUID]) -> Update:
    """Cancel tasks: at once those that are queued, as a request those that run or wait."""
    queued = tasks.c.state == State.QUEUED.value
    return (
        update(tasks)
        .where(tasks.c.task_id == any_(literal(list(task_ids), ARRAY(Uuid))), ~IS_TERMINAL)
        .values(
            cancel_requested_at=func.coalesce(tasks.c.cancel_requested_at, _NOW),
            state=case((queued, State.CANCELLED.value), else_=tasks.c.state),
            finished_at=case((queued, _NOW), else_=None),
            error=case((queued, literal(CANCELLED, JSONB)), else_=tasks.c.error),
            next_ring_at=case((queued, None), else_=tasks.c.next_ring_at),
        )
        .returning(tasks.c.task_id, tasks.c.agent, tasks.c.state, tasks.c.parent_id)
    )


def server() -> TextClause:
    """Return the server's version, and whether it takes no writes (`on`)."""
    return text(
        "SELECT current_setting('server_version'), current_setting('transaction_read_only')"
    )


def cancel_requested(task_id: UUID) -> Select[Any]:
    """Return when somebody asked to cancel a task."""
    return select(tasks.c.cancel_requested_at).where(tasks.c.task_id == task_id)


def parent_of(task_id: UUID) -> Select[Any]:
    """Return a task's parent."""
    return select(tasks.c.parent_id).where(tasks.c.task_id == task_id)


def advance_parent(child_id: UUID, parent_id: UUID) -> Update:
    """Give a waiting parent its child's outcome, once the child has one."""
    child = tasks.alias("child")
    return (
        update(tasks)
        .where(
            tasks.c.task_id == parent_id,
            tasks.c.child_id == child_id,
            tasks.c.state == State.WAITING.value,
            child.c.task_id == tasks.c.child_id,
            child.c.finished_at.is_not(None),
        )
        .values(state=child.c.state, result=child.c.result, error=child.c.error, finished_at=_NOW)
        .returning(tasks.c.task_id, tasks.c.agent, tasks.c.parent_id, tasks.c.state)
    )


_LOCKED_WITH = (
    tasks.c.task_id,
    tasks.c.claim_id,
    tasks.c.agent,
    tasks.c.parent_id,
    tasks.c.concurrency_key,
)
"""What decides which locks are taken before a task's own."""


@cache
def past_deadline(limit: int) -> Select[Any]:
    """Find queued tasks whose deadline has passed."""
    return select(*_LOCKED_WITH).where(_QUEUED, tasks.c.deadline_at <= _NOW).limit(limit)


def queued_of(task_id: UUID, agent: str, action: str) -> Select[Any]:
    """Find a task if it is queued and of this action."""
    return select(*_LOCKED_WITH).where(
        _QUEUED, tasks.c.task_id == task_id, tasks.c.agent == agent, tasks.c.action == action
    )


# --- rescue ---------------------------------------------------------------------------------

_other = tasks.alias("other")
# Suspects wait for all that is no suspect, and of themselves the oldest goes first (`neighbours`).
_HAS_COMPANY = (
    exists()
    .where(
        _other.c.worker_id == tasks.c.worker_id,
        _other.c.state == State.RUNNING.value,
        _other.c.task_id != tasks.c.task_id,
        or_(~_other.c.alone, and_(tasks.c.alone, _other.c.task_id < tasks.c.task_id)),
    )
    .correlate(tasks)
)
_WORKER_LIVES = (
    exists()
    .where(
        workers.c.worker_id == tasks.c.worker_id,
        workers.c.stopped_at.is_(None),
        workers.c.heartbeat_at > _NOW - _seconds(WORKER_DEAD_S),
    )
    .correlate(tasks)
)

_RESCUE = (
    tasks.c.task_id,
    tasks.c.agent,
    tasks.c.claim_id,
    tasks.c.crashes,
    tasks.c.rerun_after_crash,
    tasks.c.parent_id,
    tasks.c.concurrency_key,
    (~_HAS_COMPANY).label("ran_alone"),
    (~_WORKER_LIVES).label("worker_is_dead"),
)


@cache
def lease_expired(limit: int) -> Select[Any]:
    """Find running tasks whose lease has run out: the one definition of *lost*.

    It cannot see an attempt that still runs on a machine cut off from the database; the claim's
    fence refuses that one's outcome.
    """
    return select(*_RESCUE).where(_RUNNING, tasks.c.lease_expires_at < _NOW).limit(limit)


def running_on(worker_ids: Sequence[UUID]) -> Select[Any]:
    """Find the running tasks of workers that are recorded as stopped."""
    return select(*_RESCUE).where(_RUNNING, tasks.c.worker_id.in_(worker_ids))


def running_claim(task_id: UUID, claim_id: UUID) -> Select[Any]:
    """Find one running attempt whose process has died."""
    return select(*_RESCUE).where(
        _RUNNING, tasks.c.task_id == task_id, tasks.c.claim_id == claim_id
    )


# --- workers and services -------------------------------------------------------------------


def enlist(row: Mapping[str, Any]) -> Insert:
    """Insert a worker's row, unless an answer that got lost had confirmed it."""
    return insert(workers).values(row).on_conflict_do_nothing()


def beat(worker_id: UUID, *, running: int, slots: int, consuming: bool, claims: int) -> Ready:
    """Renew a worker's heartbeat, and add the tasks it began since the last one.

    One that was taken for dead lives again.
    """
    values = {"running": running, "slots": slots, "consuming": consuming, "claims": claims}
    return Ready(_BEAT, {"worker_id": worker_id, **values})


_BEAT = text(
    """
    UPDATE workers
    SET heartbeat_at = now(), stopped_at = NULL, claims = claims + :claims,
        claimed_at = CASE WHEN :claims > 0 THEN now() ELSE claimed_at END,
        running = :running, slots = :slots, consuming = :consuming
    WHERE worker_id = :worker_id RETURNING worker_id
    """
)


def discharge(worker_ids: Sequence[UUID]) -> Update:
    """Record that workers have stopped."""
    return (
        update(workers)
        .where(workers.c.worker_id.in_(worker_ids), workers.c.stopped_at.is_(None))
        .values(stopped_at=_NOW)
        .returning(workers.c.agent)
    )


def discharge_silent() -> Update:
    """Record that workers have stopped whose leases have all run out; return whose they were."""
    return _DISCHARGE_SILENT


_DISCHARGE_SILENT = (
    update(workers)
    .where(workers.c.stopped_at.is_(None), workers.c.heartbeat_at < _NOW - _seconds(LEASE_S))
    .values(stopped_at=_NOW)
    .returning(workers.c.agent)
)


def predecessors(name: str, worker_id: UUID) -> Select[Any]:
    """Find earlier workers of the same name that have not been recorded as stopped."""
    return select(
        workers.c.worker_id,
        workers.c.pid,
        workers.c.boot_id,
        workers.c.pid_namespace,
        workers.c.process_started_at,
    ).where(
        workers.c.name == name, workers.c.worker_id != worker_id, workers.c.stopped_at.is_(None)
    )


def _live(within_s: float = WORKER_DEAD_S) -> ColumnElement[bool]:
    return and_(workers.c.stopped_at.is_(None), workers.c.heartbeat_at > _NOW - _seconds(within_s))


def _age(instant: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.extract("epoch", _NOW - instant)


def live_workers(agent: str | None = None) -> Select[Any]:
    """Return the live workers, of one agent or of all."""
    statement = select(
        workers.c.name,
        workers.c.agent,
        workers.c.host,
        workers.c.pid,
        workers.c.slots,
        workers.c.running,
        _age(workers.c.heartbeat_at).label("heartbeat_age_s"),
    ).where(_live())
    if agent:
        statement = statement.where(workers.c.agent == agent)
    return statement.order_by(workers.c.name)


def busy_agents() -> TextClause:
    """Return the agents that take work and have some that may have to be rung, with their speed.

    `claims` is how many tasks their workers have begun so far, `slots` how many run at once.
    """
    return _BUSY


_BUSY = text(
    """
    SELECT w.agent, sum(w.slots)::int AS slots, sum(w.claims)::bigint AS claims
    FROM workers w
    WHERE w.stopped_at IS NULL AND w.heartbeat_at > now() - make_interval(secs => :dead_s)
      AND NOT EXISTS (SELECT 1 FROM queues q WHERE q.agent = w.agent AND q.paused)
      AND EXISTS (SELECT 1 FROM tasks t WHERE t.agent = w.agent AND t.state = 'queued'
                  AND t.next_ring_at IS NOT NULL)
    GROUP BY w.agent
    """
).bindparams(dead_s=WORKER_DEAD_S)


def claimable(agent: str, host: str, worker_id: UUID, age_s: float) -> TextClause:
    """Return whether tasks that a worker on a host could claim have waited for so long.

    Only while a relay lives, which rings them, and while no task must be alone on the worker.
    """
    return _CLAIMABLE.bindparams(
        agent=agent, host=host, worker_id=worker_id, age_s=age_s, relay_s=SERVICE_DEAD_S
    )


# The tasks last: of a queue that is paused there may be many, none of them old enough.
_CLAIMABLE = text(
    """
    SELECT NOT EXISTS (SELECT 1 FROM queues WHERE queues.agent = :agent AND paused)
      AND NOT EXISTS (SELECT 1 FROM tasks s
                      WHERE s.worker_id = :worker_id AND s.state = 'running' AND s.alone)
      AND EXISTS (SELECT 1 FROM services WHERE kind = 'relay'
                  AND heartbeat_at > now() - make_interval(secs => :relay_s))
      AND EXISTS (
          SELECT 1 FROM tasks
          WHERE agent = :agent AND state = 'queued' AND next_ring_at IS NOT NULL
            AND run_at < now() - make_interval(secs => :age_s)
            AND (host IS NULL OR host = :host) AND (deadline_at IS NULL OR deadline_at > now())
      ) AS found
    """
)


def live_hosts(agent: str) -> Select[Any]:
    """Return the hosts on which an agent has a live worker."""
    return select(workers.c.host).where(_live(), workers.c.agent == agent).distinct()


@cache
def serve(kind: str, instance: str) -> Insert:
    """Renew the heartbeat of a relay or a Beat."""
    return (
        insert(services)
        .values(kind=kind, instance=instance)
        .on_conflict_do_update(
            index_elements=[services.c.kind, services.c.instance], set_={"heartbeat_at": _NOW}
        )
    )


def retire(kind: str, instance: str) -> Delete:
    """Remove the heartbeat of a relay or a Beat that stops."""
    return delete(services).where(services.c.kind == kind, services.c.instance == instance)


# --- callbacks ------------------------------------------------------------------------------


def take_callbacks(limit: int, lease_s: float) -> TextClause:
    """Take callbacks that are due; one that is not settled within the lease is due again."""
    return _TAKE_CALLBACKS.bindparams(limit=limit, lease_s=lease_s)


_TAKE_CALLBACKS = text(
    """
    UPDATE tasks SET callback_tries = callback_tries + 1,
                     callback_next_at = now() + make_interval(secs => :lease_s)
    WHERE task_id IN (
        SELECT task_id FROM tasks
        WHERE callback_url IS NOT NULL AND finished_at IS NOT NULL AND callback_settled_at IS NULL
          AND (callback_next_at IS NULL OR callback_next_at <= now())
        ORDER BY finished_at LIMIT :limit FOR UPDATE SKIP LOCKED)
    RETURNING task_id, callback_url, callback_tries
    """
)


def settle_callback(
    task_id: UUID, tries: int, *, settled: bool, error: str | None, pause: timedelta
) -> TextClause:
    """Record that a callback was delivered or given up, or when it is tried again.

    tries: what it was taken with, the fence: whoever comes after his lease changes nothing.
    """
    return _SETTLE_CALLBACK.bindparams(
        task_id=task_id, tries=tries, settled=settled, error=error, pause=pause
    )


_SETTLE_CALLBACK = text(
    """
    UPDATE tasks SET callback_settled_at = CASE WHEN :settled THEN now() END,
                     callback_error = :error, callback_next_at = now() + :pause
    WHERE task_id = :task_id AND callback_tries = :tries AND callback_settled_at IS NULL
    """
)


# --- queues ---------------------------------------------------------------------------------


def set_queue(agent: str, *, paused: bool | None = None, draining: bool | None = None) -> Insert:
    """Pause, drain or resume a queue; what is None stays."""
    given = {"paused": paused, "draining": draining}
    changed = {name: value for name, value in given.items() if value is not None}
    return (
        insert(queues)
        .values(agent=agent, **changed)
        .on_conflict_do_update(index_elements=[queues.c.agent], set_=changed)
    )


# --- schedules ------------------------------------------------------------------------------


def declare_schedule(row: Mapping[str, Any]) -> Insert:
    """Make or bring up to date the schedule of a declaration; whether it is enabled stays.

    Its next tick stays too, unless it is due at other times now. Returns its name, unless the name
    is taken by a schedule of another source.
    """
    made = insert(schedules).values(row)
    changed: dict[str, ColumnElement[Any]] = {
        name: made.excluded[name] for name in row if name != "name"
    }
    same_times = and_(
        *(
            schedules.c[name].is_not_distinct_from(made.excluded[name])
            for name in ("every_s", "cron", "time_zone")
        )
    )
    changed["next_tick_at"] = case(
        (same_times, schedules.c.next_tick_at), else_=made.excluded.next_tick_at
    )
    return made.on_conflict_do_update(
        index_elements=[schedules.c.name],
        set_=changed,
        where=schedules.c.source == made.excluded.source,
    ).returning(schedules.c.name)


def forget_schedules(source: str, kept: Sequence[str], agents: Sequence[str] | None) -> Delete:
    """Remove the schedules of a source that it names no more; agents: only of these."""
    gone = delete(schedules).where(schedules.c.source == source, schedules.c.name.not_in(kept))
    return gone if agents is None else gone.where(schedules.c.agent.in_(agents))


def add_schedule(row: Mapping[str, Any]) -> Insert:
    """Insert a schedule; return its row, or nothing when the name is taken."""
    return insert(schedules).values(row).on_conflict_do_nothing().returning(*schedules.c)


def change_schedule(name: str, values: Mapping[str, Any]) -> Update:
    """Change a schedule; return its row."""
    return update(schedules).where(schedules.c.name == name).values(values).returning(*schedules.c)


def remove_schedule(name: str) -> Delete:
    """Delete a schedule; its tasks stay."""
    return delete(schedules).where(schedules.c.name == name)


def schedule(name: str, *, locked: bool = False) -> Select[Any]:
    """Return one schedule; locked: nobody changes it or takes its ticks until the end."""
    found = select(*schedules.c).where(schedules.c.name == name)
    return found.with_for_update() if locked else found


def all_schedules(agent: str | None) -> Select[Any]:
    """Return the schedules of one agent, or of all, by name."""
    found = select(*schedules.c).order_by(schedules.c.name)
    return found if agent is None else found.where(schedules.c.agent == agent)


def due_schedules(agents: Sequence[str]) -> TextClause:
    """Return the names of these agents' schedules of which a tick is due, longest due first."""
    return _DUE_SCHEDULES.bindparams(agents=list(agents))


_DUE_SCHEDULES = text(
    """
    SELECT name FROM schedules
    WHERE enabled AND next_tick_at <= now() AND agent = ANY(:agents)
    ORDER BY next_tick_at, name
    """
)


def take_schedule(name: str) -> TextClause:
    """Lock a schedule and return it with the time, if a tick is due and no other Beat has it."""
    return _TAKE_SCHEDULE.bindparams(name=name)


_TAKE_SCHEDULE = text(
    """
    SELECT *, now() AS now FROM schedules
    WHERE name = :name AND enabled AND next_tick_at <= now()
    FOR UPDATE SKIP LOCKED
    """
)


def advance_schedule(
    name: str, *, last_tick_at: datetime | None, next_tick_at: datetime, missed: int, skipped: int
) -> TextClause:
    """Record that a schedule's ticks were taken; last_tick_at: None when none was."""
    return _ADVANCE_SCHEDULE.bindparams(
        name=name,
        last_tick_at=last_tick_at,
        next_tick_at=next_tick_at,
        missed=missed,
        skipped=skipped,
    )


_ADVANCE_SCHEDULE = text(
    """
    UPDATE schedules
    SET last_tick_at = coalesce(CAST(:last_tick_at AS timestamptz), last_tick_at),
        next_tick_at = :next_tick_at, missed = missed + :missed, skipped = skipped + :skipped
    WHERE name = :name
    """
)


def unfinished_of_schedule(name: str) -> TextClause:
    """Return the unfinished tasks of a schedule and the hosts they are for, oldest first."""
    return _UNFINISHED_OF_SCHEDULE.bindparams(name=name)


_UNFINISHED_OF_SCHEDULE = text(
    """
    SELECT task_id, host FROM tasks
    WHERE scheduled_by = :name AND finished_at IS NULL ORDER BY task_id
    """
)


def next_tick(agents: Sequence[str]) -> TextClause:
    """Return in how many seconds the next tick of any of these agents' schedules comes."""
    return _NEXT_TICK.bindparams(agents=list(agents))


_NEXT_TICK = text(
    """
    SELECT extract(epoch FROM min(next_tick_at) - clock_timestamp())
    FROM schedules WHERE enabled AND agent = ANY(:agents)
    """
)


# --- reading --------------------------------------------------------------------------------

_TASK = """
    SELECT task_id, agent, action, state, priority, params, result, error, progress, attempt,
           max_attempts, parent_id, retry_of, scheduled_by, labels, idempotency_key, created_at,
           run_at, started_at, finished_at, deadline_at, cancel_requested_at, wait_seconds,
           run_seconds, worker, child_id, time_limit_s, concurrency_key, callback_url, host,
           (SELECT jsonb_agg(jsonb_build_object(
                'attempt', a.attempt, 'worker', a.worker, 'started_at', a.started_at,
                'ended_at', a.ended_at, 'outcome', a.outcome, 'error', a.error)
                ORDER BY a.attempt)
            FROM attempts a WHERE a.task_id = tasks.task_id) AS attempts
    FROM tasks
"""

_ONE_TASK = text(f"{_TASK} WHERE task_id = :task_id")


def result(*task_ids: UUID) -> Ready:
    """Return how tasks stand, without the rest of their rows, for clients that waited."""
    return Ready(_RESULT, {"task_ids": _array(task_ids)})


_RESULT = text(
    """
    SELECT task_id, action, state, result, error FROM tasks
    WHERE task_id = ANY(CAST(:task_ids AS uuid[]))
    """
)


def task(task_id: UUID) -> TextClause:
    """Return one task, with its ended attempts as a JSON array."""
    return _ONE_TASK.bindparams(task_id=task_id)


def followed(task_id: UUID, after: int, limit: int) -> TextClause:
    """Return one task as `task` does, with its stored events after one; all of one instant."""
    return _FOLLOWED.bindparams(task_id=task_id, after=after, limit=limit)


_FOLLOWED = text(
    f"""
    SELECT t.*, (
        SELECT jsonb_agg(jsonb_build_array(e.event_id, e.kind, e.data) ORDER BY e.event_id)
        FROM (SELECT event_id, kind, data FROM task_events
              WHERE task_events.task_id = :task_id AND event_id > :after
              ORDER BY event_id LIMIT :limit) AS e) AS told
    FROM ({_TASK} WHERE task_id = :task_id) AS t
    """  # noqa: S608 - the inserted text is a constant
)


def tasks_page(
    *,
    limit: int,
    agent: str | None = None,
    action: str | None = None,
    states: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    parent_id: UUID | None = None,
    before: tuple[datetime, UUID] | None = None,
) -> TextClause:
    """Return a page of tasks, newest first.

    before: when the last task of the page before was accepted, and its id. docs/decisions/0015 says
    which way leads to the tasks, and what it passes over.
    """
    before_at, before_id = before or (None, None)
    values = _given(
        limit=limit,
        agent=agent,
        action=action,
        labels=labels,
        since=since,
        until=until,
        parent_id=parent_id,
        before_at=before_at,
        before_id=before_id,
    )
    within = _fitting(
        values,
        since="created_at >= :since",
        until="created_at < :until",
        before_at="(created_at, task_id) < (:before_at, :before_id)",
    )
    chosen = [state for state in State if not states or state in states]
    listed = ", ".join(f"'{state}'" for state in chosen)
    fitting = _fitting(values, action="action = :action", labels=_HAS_LABELS)
    fitting += f" AND state IN ({listed})" if states else ""
    if "parent_id" in values:
        fitting += _fitting(values, agent="agent = :agent")
        found = _CHILDREN.format(within=within, fitting=fitting)
    elif labels:
        values["label"], values["value"] = next(iter(labels.items()))
        is_given = "agent" in values
        known = _GIVEN_AGENT if is_given else _AGENTS.format(known=_known_actions(values))
        found = _LABELLED.format(known=known, within=within, fitting=fitting)
    else:
        each = (_OF_ONE_STATE.format(state=state, within=within) for state in chosen)
        found = _OF_STATES.format(known=_known_actions(values), of_states=" UNION ALL ".join(each))
    return text(_PAGE.format(task=_TASK, found=found)).bindparams(**values)


def _given(labels: Mapping[str, str] | None, **values: Any) -> dict[str, Any]:
    """Return the values of the conditions that there are."""
    values["labels"] = payload.dumps(dict(labels)) if labels else None
    return {name: value for name, value in values.items() if value}


def _fitting(values: Collection[str], **conditions: str) -> str:
    """Return those of the conditions for which there is a value."""
    return "".join(f" AND {each}" for name, each in conditions.items() if name in values)


_HAS_LABELS = "labels @> CAST(:labels AS jsonb)"


def _known_actions(values: Collection[str]) -> str:
    """Return a query of the agents and actions that there are tasks of."""
    if "agent" not in values:
        return _KNOWN_ACTIONS.format(
            whose="true",
            earlier="(agent, action) < (known.agent, known.action)",
            which="action = :action" if "action" in values else "true",
        )
    if "action" not in values:
        return _KNOWN_ACTIONS.format(
            whose="agent = :agent", earlier="agent = :agent AND action < known.action", which="true"
        )
    return "SELECT CAST(:agent AS text) AS agent, CAST(:action AS text) AS action"


_GIVEN_AGENT = "SELECT CAST(:agent AS text) AS agent"
_AGENTS = "SELECT DISTINCT agent FROM ({known}) AS known"

# From one to the next by index, from the last to the first: the oldest entries of an action may be
# of what is long gone, its newest are not.
_KNOWN_ACTIONS = """
    WITH RECURSIVE known AS (
        (SELECT agent, action FROM tasks WHERE {whose} ORDER BY agent DESC, action DESC LIMIT 1)
        UNION ALL
        SELECT next.agent, next.action FROM known CROSS JOIN LATERAL (
            SELECT agent, action FROM tasks WHERE {earlier}
            ORDER BY agent DESC, action DESC LIMIT 1) AS next
    )
    SELECT agent, action FROM known WHERE {which}
"""

# An array, because with a join the planner may read all of history.
_PAGE = """
    {task} WHERE task_id = ANY(ARRAY(
        SELECT task_id FROM ({found}) AS found
        ORDER BY created_at DESC, task_id DESC LIMIT :limit))
    ORDER BY created_at DESC, task_id DESC
"""

_OF_STATES = """
    SELECT newest.task_id, newest.created_at FROM ({known}) AS known CROSS JOIN LATERAL (
        SELECT task_id, created_at FROM ({of_states}) AS of_states
        ORDER BY created_at DESC, task_id DESC LIMIT :limit) AS newest
"""

# In order, so that no more than a page is read of all of them.
_OF_ONE_STATE = """
    (SELECT task_id, created_at FROM tasks
     WHERE agent = known.agent AND action = known.action AND state = '{state}' {within}
     ORDER BY created_at DESC, task_id DESC LIMIT :limit)
"""

_LABELLED = """
    SELECT newest.task_id, newest.created_at FROM ({known}) AS known CROSS JOIN LATERAL (
        SELECT task_id, created_at FROM task_labels AS l
        WHERE l.agent = known.agent AND l.name = :label AND l.value = :value {within}
          AND EXISTS (SELECT 1 FROM tasks AS t WHERE t.task_id = l.task_id {fitting})
        ORDER BY created_at DESC, task_id DESC LIMIT :limit) AS newest
"""

_CHILDREN = """
    (SELECT task_id, created_at FROM tasks WHERE parent_id = :parent_id {within} {fitting}
     ORDER BY created_at DESC, task_id DESC LIMIT :limit)
"""


def ended(task_ids: Sequence[UUID]) -> Ready:
    """Return which of these tasks are terminal."""
    return Ready(_ENDED, {"task_ids": _array(task_ids)})


_ENDED = text(
    """
    SELECT task_id FROM tasks
    WHERE task_id = ANY(CAST(:task_ids AS uuid[])) AND finished_at IS NOT NULL
    """
)


def queue_position(task_id: UUID, agent: str, priority: int) -> TextClause:
    """Count the queued tasks before this one; `DEPTH_LIMIT` + 1 means more than that."""
    return _QUEUE_POSITION.bindparams(
        task_id=task_id, agent=agent, priority=priority, bound=DEPTH_LIMIT + 1
    )


_QUEUE_POSITION = text(
    """
    SELECT count(*) AS count FROM (
        SELECT 1 FROM tasks
        WHERE agent = :agent AND state = 'queued' AND next_ring_at IS NOT NULL
          AND priority > :priority
        UNION ALL
        SELECT 1 FROM tasks
        WHERE agent = :agent AND state = 'queued' AND next_ring_at IS NOT NULL
          AND priority = :priority AND task_id < :task_id
        LIMIT :bound) AS bounded
    """
)


# What only a host without a live worker could run makes nobody unhealthy.
_STATUS = """
    WITH live AS (
        SELECT * FROM workers w
        WHERE w.stopped_at IS NULL AND w.heartbeat_at > now() - make_interval(secs => :dead_s)
    )
    SELECT a.agent,
           coalesce(q.paused, false) AS paused,
           coalesce(q.draining, false) AS draining,
           (SELECT count(*) FROM (
                SELECT 1 FROM tasks t
                WHERE t.agent = a.agent AND t.state = 'queued' AND t.next_ring_at IS NOT NULL
                LIMIT :bound) AS bounded) AS depth,
           (SELECT extract(epoch FROM now() - min(x.run_at))
            FROM generate_series(0, 9) AS level(priority) CROSS JOIN LATERAL (
                SELECT t.run_at FROM (
                    SELECT run_at, host FROM tasks
                    WHERE agent = a.agent AND state = 'queued' AND next_ring_at IS NOT NULL
                      AND priority = level.priority
                    ORDER BY task_id LIMIT :bound) AS t
                WHERE t.host IS NULL OR t.host IN (SELECT w.host FROM live w
                                                   WHERE w.agent = a.agent)
                LIMIT 1) AS x) AS oldest_age_s,
           (SELECT count(*) FROM tasks t
            WHERE t.agent = a.agent AND t.state = 'running') AS running,
           (SELECT count(*) FROM (
                SELECT 1 FROM tasks t
                WHERE t.agent = a.agent AND t.state = 'queued' AND t.held
                LIMIT :bound) AS bounded) AS held,
           (SELECT jsonb_agg(jsonb_build_object(
                'id', w.name, 'host', w.host, 'pid', w.pid,
                'heartbeat_age_s', extract(epoch FROM now() - w.heartbeat_at),
                'slots', w.slots, 'running', w.running, 'consuming', w.consuming,
                'alone', EXISTS (SELECT 1 FROM tasks s WHERE s.worker_id = w.worker_id
                                 AND s.state = 'running' AND s.alone),
                'idle_s', extract(epoch FROM now() - coalesce(w.claimed_at, w.started_at)))
                ORDER BY w.name)
            FROM live w WHERE w.agent = a.agent) AS workers,
           (SELECT min(extract(epoch FROM now() - w.heartbeat_at))
            FROM workers w WHERE w.agent = a.agent) AS last_seen_s,
           (SELECT min(extract(epoch FROM now() - s.heartbeat_at))
            FROM services s WHERE s.kind = 'relay') AS relay_age_s,
           (SELECT min(extract(epoch FROM now() - s.heartbeat_at))
            FROM services s WHERE s.kind = 'beat') AS beat_age_s
    FROM unnest(cast(:agents AS text[])) AS a(agent)
    LEFT JOIN queues q ON q.agent = a.agent
"""


def status(agents: Sequence[str]) -> TextClause:
    """Return one row an agent: its live workers, its queue, and the ages of relay and Beat."""
    return text(_STATUS).bindparams(
        agents=list(agents), dead_s=WORKER_DEAD_S, bound=DEPTH_LIMIT + 1
    )


_ACTIVITY = """
    SELECT a.agent, ended.succeeded, ended.failed
    FROM unnest(cast(:agents AS text[])) AS a(agent) CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE state = 'succeeded') AS succeeded,
               count(*) FILTER (WHERE state = 'failed') AS failed
        FROM tasks t
        WHERE t.agent = a.agent AND t.finished_at > now() - make_interval(secs => :window_s)
    ) AS ended
"""


def activity(agents: Sequence[str], window_s: float) -> TextClause:
    """Return one row an agent: how many of its tasks ended within the last seconds."""
    return text(_ACTIVITY).bindparams(agents=list(agents), window_s=window_s)


# --- prune ----------------------------------------------------------------------------------

# Of a tree that has not ended nothing goes: the line from each of its members up to its root meets
# one that has not ended, or one that such a one descends from.
_PRUNE = """
    WITH RECURSIVE ancestors AS (
        SELECT parent_id AS task_id FROM tasks
        WHERE parent_id IS NOT NULL AND finished_at IS NULL
        UNION
        SELECT t.parent_id FROM ancestors JOIN tasks t USING (task_id)
        WHERE t.parent_id IS NOT NULL
    ), {old}, gone_attempts AS (
        DELETE FROM attempts USING old WHERE attempts.task_id = old.task_id
    ), gone_events AS (
        DELETE FROM task_events USING old WHERE task_events.task_id = old.task_id
    ), gone_keys AS (
        DELETE FROM idempotency_keys k USING old WHERE k.task_id = old.task_id
    ), gone AS (
        DELETE FROM tasks USING old WHERE tasks.task_id = old.task_id
        RETURNING tasks.agent, tasks.action, tasks.state
    ), added AS (
        INSERT INTO totals AS t (agent, action, state, tasks)
        SELECT agent, action, state, count(*) FROM gone GROUP BY agent, action, state
        ORDER BY agent, action, state
        ON CONFLICT (agent, action, state) DO UPDATE SET tasks = t.tasks + excluded.tasks
    )
    SELECT count(*) FROM gone
"""

_WHOLE = """
    NOT EXISTS (
        WITH RECURSIVE line AS (
            SELECT t.task_id, t.parent_id, t.finished_at
            UNION ALL
            SELECT p.task_id, p.parent_id, p.finished_at
            FROM line JOIN tasks p ON p.task_id = line.parent_id)
        SELECT 1 FROM line
        WHERE finished_at IS NULL OR task_id IN (SELECT task_id FROM ancestors))
"""

# Each agent's tasks by its own retention, so that none is read again and again until it is due;
# from one agent to the next by index, so that also those that are declared no more are found.
_OLD = """
    known AS (
        SELECT min(agent) AS agent FROM tasks WHERE finished_at IS NOT NULL
        UNION ALL
        SELECT (SELECT min(t.agent) FROM tasks t
                WHERE t.finished_at IS NOT NULL AND t.agent > known.agent)
        FROM known WHERE known.agent IS NOT NULL
    ), old AS (
        SELECT o.task_id FROM known CROSS JOIN LATERAL (
            SELECT t.task_id FROM tasks t
            WHERE t.agent = known.agent AND t.tick_at IS NULL
              AND t.finished_at < now() - make_interval(secs => coalesce(
                  CAST(CAST(:retention AS jsonb) ->> known.agent AS float8), :otherwise_s))
              AND {whole}
            ORDER BY t.finished_at LIMIT :limit) AS o
        LIMIT :limit
    )
"""

_OLD_TICKS = """
    old AS (
        SELECT t.task_id FROM tasks t
        WHERE t.tick_at IS NOT NULL AND t.finished_at < now() - make_interval(secs => :after_s)
          AND {whole}
        ORDER BY t.finished_at LIMIT :limit
    )
"""


def prune(retention: Mapping[str, timedelta], *, otherwise: timedelta, limit: int) -> TextClause:
    """Delete terminal tasks older than their agent's retention, with all that is theirs.

    Not those of schedules' ticks. They are added to the totals, so that counters never go back.
    Returns how many there were.
    `prepare_prune` comes before it.
    """
    seconds = {agent: kept.total_seconds() for agent, kept in retention.items()}
    return text(_PRUNE.format(old=_OLD.format(whole=_WHOLE))).bindparams(
        retention=payload.dumps(seconds), otherwise_s=otherwise.total_seconds(), limit=limit
    )


def prune_ticks(*, after: timedelta, limit: int) -> TextClause:
    """Do the same as `prune` for the tasks of schedules' ticks, whoever's they are."""
    return text(_PRUNE.format(old=_OLD_TICKS.format(whole=_WHOLE))).bindparams(
        after_s=after.total_seconds(), limit=limit
    )


def prepare_prune() -> TextClause:
    """Let the transaction hash the ancestors of what goes on, of which there may be many.

    With the usual memory each old row would read the list of all of them.
    """
    return text("SELECT set_config('work_mem', '64MB', true)")


def prune_concurrency_keys(limit: int) -> TextClause:
    """Delete concurrency keys that no unfinished task has."""
    return text(_PRUNE_CONCURRENCY_KEYS).bindparams(limit=limit)


_PRUNE_CONCURRENCY_KEYS = """
    DELETE FROM concurrency_keys WHERE (agent, key) IN (
        SELECT k.agent, k.key FROM concurrency_keys k
        WHERE coalesce(k.next_at, '-infinity') < now() AND NOT EXISTS (
            SELECT 1 FROM tasks t
            WHERE t.agent = k.agent AND t.concurrency_key = k.key AND t.finished_at IS NULL)
        LIMIT :limit FOR UPDATE SKIP LOCKED)
"""


def prune_workers(after_s: float) -> Delete:
    """Delete the rows of workers that have long been gone."""
    return delete(workers).where(workers.c.heartbeat_at < _NOW - _seconds(after_s))


def prune_services(after_s: float) -> Delete:
    """Delete the heartbeats of relays and Beats that have long been gone."""
    return delete(services).where(services.c.heartbeat_at < _NOW - _seconds(after_s))
