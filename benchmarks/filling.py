"""Fills the tables with a history and a backlog, as years of use would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg

from benchmarks.place import AGENT

CHUNK = 250_000

HISTORY_DAYS = 20
"""Shorter than the retention, so that nothing is pruned meanwhile."""

LEVELS = 10
"""Of priority; a backlog has as many tasks of each."""


def fill_history(
    connection: psycopg.Connection[Any], have: int, wanted: int, say: Callable[[str], None]
) -> None:
    """Insert ended tasks, each with its attempt, until there are so many; `have` are there.

    One in fifty has failed, one in four is another agent's, one in twenty is labelled; one in
    100,000 is of another action, and as many have another label.
    """
    connection.execute("SET synchronous_commit = off")
    for start in range(have, wanted, CHUNK):
        count = min(CHUNK, wanted - start)
        values = {"count": count, "agent": AGENT, "days": HISTORY_DAYS, "start": start}
        connection.execute(_HISTORY, {**values, "wanted": wanted})
        if wanted >= 4 * CHUNK and start % (4 * CHUNK) == 0:
            say(f"{start + count:,} of {wanted:,} ended tasks")
    settle(connection)


_HISTORY = """
    WITH made AS (
        INSERT INTO tasks (
            task_id, agent, action, state, params, result, error, attempt, created_at, run_at,
            started_at, finished_at, failures, claim_id, worker, worker_id, rings, labels)
        SELECT
            id, agent, action, CASE WHEN failed THEN 'failed' ELSE 'succeeded' END,
            jsonb_build_object('number', n),
            CASE WHEN NOT failed THEN jsonb_build_object('number', n) END,
            CASE WHEN failed THEN jsonb_build_object(
                'code', 'task_failed', 'message', 'no luck', 'retryable', true) END,
            1, at, at, at + interval '20 ms', at + interval '25 ms', failed::int,
            gen_random_uuid(), agent || '@host', '00000000-0000-7000-8000-000000000001', 1, labels
        FROM (
            SELECT n, id, uuid_extract_timestamp(id) AS at, n %% 50 = 0 AS failed,
                   CASE WHEN n %% 4 = 0 THEN 'other' ELSE %(agent)s END AS agent,
                   CASE WHEN n %% 100000 = 6 THEN 'describe' ELSE 'echo' END AS action,
                   CASE WHEN n %% 100000 = 7 THEN jsonb_build_object('colour', 'red')
                        WHEN n %% 20 = 1 THEN jsonb_build_object('colour', 'blue')
                        ELSE '{}' END AS labels
            FROM (
                SELECT n, uuidv7(-interval '1 hour' - make_interval(days => %(days)s)
                                 * (1 - n / %(wanted)s::float8)) AS id
                FROM generate_series(%(start)s + 1, %(start)s + %(count)s) AS n
                OFFSET 0
            ) AS numbered
        ) AS planned
        RETURNING task_id, attempt, claim_id, worker, started_at, finished_at, state, error
    )
    INSERT INTO attempts (task_id, attempt, claim_id, worker, started_at, ended_at, outcome, error)
    SELECT task_id, attempt, claim_id, worker, started_at, finished_at, state, error FROM made
"""


def fill_backlog(connection: psycopg.Connection[Any], wanted: int) -> None:
    """Insert queued tasks, as many of each priority, until so many are queued."""
    connection.execute("SET synchronous_commit = off")
    row = connection.execute(_QUEUED, {"agent": AGENT}).fetchone()
    have = row[0] if row else 0
    for start in range(have, wanted, CHUNK):
        count = min(CHUNK, wanted - start)
        connection.execute(_BACKLOG, {"count": count, "agent": AGENT, "levels": LEVELS})
    settle(connection)


_QUEUED = "SELECT count(*) FROM tasks WHERE agent = %(agent)s AND state = 'queued'"

_BACKLOG = """
    INSERT INTO tasks (task_id, agent, action, priority, params, next_ring_at)
    SELECT uuidv7(), %(agent)s, 'echo', n %% %(levels)s, jsonb_build_object('number', n), now()
    FROM generate_series(1, %(count)s) AS n
"""


def settle(connection: psycopg.Connection[Any]) -> None:
    """Do now what PostgreSQL would do in the middle of a measurement; needs its superuser."""
    connection.execute("RESET synchronous_commit")
    connection.execute("VACUUM (ANALYZE) tasks, attempts")
    connection.execute("CHECKPOINT")
