"""The tables of the platform; agents that keep data of their own add tables to `metadata`."""

from __future__ import annotations

import os
import time
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Double,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from sutazai.state import TERMINAL, State

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "uq": "%(table_name)s_%(column_0_name)s_key",
    }
)

Instant = DateTime(timezone=True)
_NOW = text("now()")

# The first columns are those of the task's JSON, in its order, because people read this table with
# psql; what follows is the platform's own bookkeeping.
tasks = Table(
    "tasks",
    metadata,
    Column("task_id", Uuid, primary_key=True),
    Column("agent", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("state", Text, nullable=False, server_default=State.QUEUED.value),
    Column("priority", SmallInteger, nullable=False, server_default="5"),
    Column("params", JSONB(none_as_null=True), nullable=False, server_default=text("'{}'::jsonb")),
    Column("result", JSONB(none_as_null=True)),
    Column("error", JSONB(none_as_null=True)),
    Column("progress", JSONB(none_as_null=True)),
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("max_attempts", Integer, nullable=False, server_default="1"),
    Column("parent_id", Uuid),
    Column("retry_of", Uuid),
    Column("scheduled_by", Text),
    Column("labels", JSONB(none_as_null=True), nullable=False, server_default=text("'{}'::jsonb")),
    Column("idempotency_key", Text),
    Column("created_at", Instant, nullable=False, server_default=_NOW),
    Column("run_at", Instant, nullable=False, server_default=_NOW),
    Column("started_at", Instant),
    Column("finished_at", Instant),
    Column("deadline_at", Instant),
    Column("cancel_requested_at", Instant),
    Column(
        "wait_seconds",
        Double,
        # Of the latest attempt: a task that is to be retried has not waited for its next one yet.
        Computed(
            "CASE WHEN state <> 'queued' THEN greatest(0, extract(epoch from "
            "started_at - greatest(created_at, run_at))) END",
            persisted=True,
        ),
    ),
    Column(
        "run_seconds",
        Double,
        Computed("extract(epoch from finished_at - started_at)", persisted=True),
    ),
    Column("time_limit_s", Double, nullable=False, server_default="60"),
    Column("rerun_after_crash", Boolean, nullable=False, server_default=text("true")),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("crashes", Integer, nullable=False, server_default="0"),
    # A suspect: it was running when its process or its worker died.
    Column("alone", Boolean, nullable=False, server_default=text("false")),
    # Of tasks with an equal key only so many run at once; `held` while that many do.
    Column("concurrency_key", Text),
    Column("held", Boolean, nullable=False, server_default=text("false")),
    Column("host", Text),
    Column("tick_at", Instant),
    Column("call_index", Integer),
    Column("child_id", Uuid),
    Column("source", Text, nullable=False, server_default="api"),
    # The fence: made anew by each claim, so that a late attempt can be told from the current one.
    Column("claim_id", Uuid),
    Column("worker", Text),
    Column("worker_id", Uuid),
    Column("lease_expires_at", Instant),
    # next_ring_at is NULL while the row must not be rung: it runs, has ended, or is not yet due.
    Column("rings", Integer, nullable=False, server_default="0"),
    Column("next_ring_at", Instant),
    # A terminal row with a callback_url and without callback_settled_at is a callback that is due.
    Column("callback_url", Text),
    Column("callback_tries", Integer, nullable=False, server_default="0"),
    Column("callback_next_at", Instant),
    Column("callback_settled_at", Instant),
    Column("callback_error", Text),
    CheckConstraint(f"state IN ({', '.join(repr(s.value) for s in State)})", name="state"),
    CheckConstraint("priority BETWEEN 0 AND 9", name="priority"),
)

_QUEUED = tasks.c.state == State.QUEUED.value

# UUIDv7 ids grow with time, so task_id stands for age where the order of ringing matters.
Index(
    "tasks_due",
    tasks.c.agent,
    tasks.c.priority.desc(),
    tasks.c.task_id,
    postgresql_where=_QUEUED & tasks.c.next_ring_at.is_not(None),
)
Index(
    "tasks_rung",
    tasks.c.agent,
    tasks.c.next_ring_at,
    postgresql_where=_QUEUED & (tasks.c.rings > 0),
)
Index(
    "tasks_not_due",
    tasks.c.run_at,
    postgresql_where=_QUEUED & tasks.c.next_ring_at.is_(None) & ~tasks.c.held,
)
Index(
    "tasks_held",
    tasks.c.agent,
    tasks.c.concurrency_key,
    tasks.c.priority.desc(),
    tasks.c.task_id,
    postgresql_where=_QUEUED & tasks.c.held,
)
Index(
    "tasks_key",
    tasks.c.agent,
    tasks.c.concurrency_key,
    postgresql_where=tasks.c.concurrency_key.is_not(None) & tasks.c.finished_at.is_(None),
)
Index(
    "tasks_callback",
    tasks.c.finished_at,
    postgresql_where=tasks.c.callback_url.is_not(None)
    & tasks.c.finished_at.is_not(None)
    & tasks.c.callback_settled_at.is_(None),
)
Index(
    "tasks_deadline",
    tasks.c.deadline_at,
    postgresql_where=_QUEUED & tasks.c.deadline_at.is_not(None),
)
Index(
    "tasks_lease",
    tasks.c.lease_expires_at,
    postgresql_where=tasks.c.state == State.RUNNING.value,
)
# Nearly always empty, so that a claim may look here for a task that must run alone.
Index(
    "tasks_suspect",
    tasks.c.worker_id,
    postgresql_where=(tasks.c.state == State.RUNNING.value) & tasks.c.alone,
)
Index("tasks_retry_of", tasks.c.retry_of, postgresql_where=tasks.c.retry_of.is_not(None))
# Of an error code, in the order in which they are tried again. The second condition keeps plans
# that look for no code away: of each action they would read all that has failed.
Index(
    "tasks_error_code",
    tasks.c.agent,
    tasks.c.state,
    text("(error ->> 'code')"),
    tasks.c.created_at,
    tasks.c.task_id,
    postgresql_where=text("state IN ('failed', 'cancelled') AND (error ->> 'code') IS NOT NULL"),
)
# Of pages of tasks: docs/decisions/0015.
Index(
    "tasks_listed",
    tasks.c.agent,
    tasks.c.action,
    tasks.c.state,
    tasks.c.created_at,
    tasks.c.task_id,
)
Index(
    "tasks_children",
    tasks.c.parent_id,
    tasks.c.created_at,
    tasks.c.task_id,
    postgresql_where=tasks.c.parent_id.is_not(None),
)
Index(
    "tasks_ended",
    tasks.c.agent,
    tasks.c.finished_at,
    postgresql_where=tasks.c.finished_at.is_not(None),
)
Index(
    "tasks_unfinished_child",
    tasks.c.parent_id,
    postgresql_where=tasks.c.parent_id.is_not(None) & tasks.c.finished_at.is_(None),
)
Index(
    "tasks_finished_tick",
    tasks.c.finished_at,
    postgresql_where=tasks.c.finished_at.is_not(None) & tasks.c.tick_at.is_not(None),
)
Index(
    "tasks_scheduled",
    tasks.c.scheduled_by,
    postgresql_where=tasks.c.scheduled_by.is_not(None) & tasks.c.finished_at.is_(None),
)
Index(
    "tasks_call",
    tasks.c.parent_id,
    tasks.c.call_index,
    unique=True,
    postgresql_where=tasks.c.call_index.is_not(None),
)
Index(
    "tasks_tick",
    tasks.c.scheduled_by,
    tasks.c.tick_at,
    text("coalesce(host, '')"),
    unique=True,
    postgresql_where=tasks.c.tick_at.is_not(None),
)

# What `tasks.labels` says, to be found by; kept by triggers on `tasks`.
task_labels = Table(
    "task_labels",
    metadata,
    Column("agent", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Text, primary_key=True),
    Column("created_at", Instant, primary_key=True),
    Column("task_id", Uuid, primary_key=True),
)

attempts = Table(
    "attempts",
    metadata,
    Column("task_id", Uuid, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("claim_id", Uuid, nullable=False),
    Column("worker", Text, nullable=False),
    Column("started_at", Instant, nullable=False),
    Column("ended_at", Instant, nullable=False, server_default=_NOW),
    Column("outcome", Text, nullable=False),
    Column("error", JSONB(none_as_null=True)),
)

workers = Table(
    "workers",
    metadata,
    Column("worker_id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("agent", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    # pids are comparable only under an equal boot id and pid namespace; process_started_at tells a
    # reused pid from the old one.
    Column("boot_id", Text, nullable=False),
    Column("pid_namespace", Text, nullable=False),
    Column("process_started_at", Double, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("running", Integer, nullable=False, server_default="0"),
    Column("claims", BigInteger, nullable=False, server_default="0"),
    Column("consuming", Boolean, nullable=False, server_default=text("true")),
    Column("started_at", Instant, nullable=False, server_default=_NOW),
    Column("heartbeat_at", Instant, nullable=False, server_default=_NOW),
    Column("claimed_at", Instant),
    Column("stopped_at", Instant),
)
Index("workers_agent", workers.c.agent, workers.c.heartbeat_at)

services = Table(
    "services",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("instance", Text, primary_key=True),
    Column("heartbeat_at", Instant, nullable=False, server_default=_NOW),
)

queues = Table(
    "queues",
    metadata,
    Column("agent", Text, primary_key=True),
    # Paused: tasks are accepted and none is started. Draining: none is accepted, those there end.
    Column("paused", Boolean, nullable=False, server_default=text("false")),
    Column("draining", Boolean, nullable=False, server_default=text("false")),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("principal", Text, primary_key=True),
    Column("agent", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("task_id", Uuid, nullable=False),
    # Of what was asked for: the same key with another payload is refused.
    Column("fingerprint", Text, nullable=False),
)
Index("idempotency_keys_task", idempotency_keys.c.task_id)

concurrency_keys = Table(
    "concurrency_keys",
    metadata,
    Column("agent", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    # Of the action that claimed last, for those who wake what is held.
    Column("slots", Integer, nullable=False, server_default="1"),
    Column("rate_per_s", Double),
    # When the next task may start if tasks start evenly (GCRA's theoretical arrival time).
    Column("next_at", Instant),
)

# What an attempt tells while it runs; changes of state are told by tasks and attempts themselves.
task_events = Table(
    "task_events",
    metadata,
    Column("task_id", Uuid, primary_key=True),
    # Microseconds since the epoch times 1000, and the place within one commit: grows with time.
    Column("event_id", BigInteger, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("data", JSONB, nullable=False),
)

# What was pruned, so that totals never go back.
totals = Table(
    "totals",
    metadata,
    Column("agent", Text, primary_key=True),
    Column("action", Text, primary_key=True),
    Column("state", Text, primary_key=True),
    Column("tasks", BigInteger, nullable=False),
)

schedules = Table(
    "schedules",
    metadata,
    Column("name", Text, primary_key=True),
    # Where it is changed: declaration, celeryconfig, or user, who has the routes and commands.
    Column("source", Text, nullable=False, server_default="declaration"),
    Column("agent", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("params", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("priority", SmallInteger, nullable=False, server_default="5"),
    Column("every_s", Double),
    Column("cron", Text),
    Column("time_zone", Text, nullable=False, server_default="UTC"),
    Column("each_host", Boolean, nullable=False, server_default=text("false")),
    Column("enabled", Boolean, nullable=False, server_default=text("true")),
    Column("overlap", Text, nullable=False, server_default="queue"),
    # So many of the latest ticks are made up for; 0: only a tick that is on time is taken.
    Column("catch_up", Integer, nullable=False, server_default="1"),
    Column("jitter_s", Double, nullable=False, server_default="0"),
    # Whether the deadline of a tick's task is the next tick.
    Column("expires", Boolean, nullable=False, server_default=text("true")),
    Column("last_tick_at", Instant),
    Column("next_tick_at", Instant, nullable=False, server_default=_NOW),
    Column("missed", BigInteger, nullable=False, server_default="0"),
    Column("skipped", BigInteger, nullable=False, server_default="0"),
    CheckConstraint("every_s >= 1", name="every_s"),
    CheckConstraint("(every_s IS NULL) <> (cron IS NULL)", name="timing"),
    CheckConstraint("source IN ('declaration', 'celeryconfig', 'user')", name="source"),
    CheckConstraint("overlap IN ('skip', 'queue', 'replace')", name="overlap"),
)

IS_TERMINAL = tasks.c.state.in_(TERMINAL)


def new_id() -> UUID:
    """Return a UUIDv7 (RFC 9562): 48 bits of milliseconds, its fraction, then chance.

    The 12 bits after the version hold the fraction of the millisecond (the RFC's method 3), so ids
    made by one process within a millisecond keep their order.
    """
    nanoseconds = time.time_ns()
    milliseconds, rest = divmod(nanoseconds, 1_000_000)
    fraction = rest * 4096 // 1_000_000
    value = milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | _chance() >> 2
    return UUID(int=value)


# Asking the system for each id costs as much as all the rest of it, and lets go of the interpreter.
_chances: list[int] = []
os.register_at_fork(after_in_child=_chances.clear)


def _chance() -> int:
    """Return 64 bits of chance."""
    while True:
        try:
            return _chances.pop()
        except IndexError:
            _chances.extend(memoryview(os.urandom(64 * 8)).cast("Q"))
