"""Shows how PostgreSQL carries out each statement on a large table; writes docs/statements.md."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import Executable, create_engine, event

from benchmarks.filling import fill_backlog, fill_history
from benchmarks.machine import machine
from benchmarks.place import AGENT
from benchmarks.stores import Stores, stores
from sutazai import db, migration, statements
from sutazai.agent import RETENTION
from sutazai.bell import TOGETHER_MAX
from sutazai.models import new_id
from sutazai.settings import override
from sutazai.state import Outcome, State

REPORT = Path(__file__).parents[1] / "docs" / "statements.md"
WORKER_ID = UUID("00000000-0000-7000-8000-000000000002")
RUNNING = 100
CHILDREN = 5_000
OTHERS = ("other", "idle")
CLAIMANT: dict[str, Any] = {
    "agent": AGENT,
    "action": "echo",
    "worker": f"{AGENT}@host",
    "worker_id": WORKER_ID,
    "host": "host",
}


@dataclass(frozen=True)
class Sample:
    """Rows of the table that statements are tried on."""

    queued: list[UUID]
    running: list[tuple[UUID, UUID]]
    """Tasks and their claims."""
    ended: UUID
    """A task with many children, which have ended too."""
    since: datetime


def main(arguments: Sequence[str]) -> None:
    """Fill a database of its own, explain every statement, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explain", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="ended tasks")
    parser.add_argument("--backlog", type=int, default=1_000_000, help="tasks that wait")
    parser.add_argument("--print", action="store_true", help="print it, and write nothing")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="sutazai-explain-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        with stores(folder) as own:
            text = "\n".join(_report(own, options.rows, options.backlog)) + "\n"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.print:
        _say(text)
    else:
        REPORT.write_text(text)
        _say(f"Wrote {REPORT}.")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _report(own: Stores, rows: int, backlog: int) -> Iterator[str]:
    override(home=str(own.folder), database_url=own.database_url, broker_url=own.broker_url)
    migration.migrate()
    with psycopg.connect(own.superuser_url, autocommit=True) as connection:
        fill_history(connection, 0, rows, _say)
        fill_backlog(connection, backlog)
        sample = _prepare(connection)
    explained = {name: _explain(made) for name, made in wanted(sample).items()}
    yield "# How the statements are carried out"
    yield ""
    yield (
        f"`python -m benchmarks.explain` on {datetime.now(UTC):%Y-%m-%d}: {rows:,} ended tasks "
        f"with their attempts, {backlog:,} queued ones of all priorities, {RUNNING} running. "
        f"{', '.join(own.versions)} with the settings of `sutazai up`; {machine()}. Every "
        "statement ran twice and was rolled back; the second plan stands here, so what it reads "
        "is in memory mostly."
    )
    yield ""
    yield "| statement | time | pages | reads tables by |"
    yield "|---|---|---|---|"
    for name, plan in explained.items():
        yield f"| [`{name}`](#{_anchor(name)}) | {_time(plan)} | {_pages(plan)} | {_scans(plan)} |"
    for name, plan in explained.items():
        yield ""
        yield f"## {name}"
        yield ""
        yield "```"
        yield from plan
        yield "```"


def _prepare(connection: psycopg.Connection[Any]) -> Sample:
    """Let some tasks run, and return what the statements are tried on."""
    connection.execute(_ENLIST, {"id": WORKER_ID, "agent": AGENT})
    connection.execute(_LET_RUN, {"id": WORKER_ID, "agent": AGENT, "count": RUNNING})
    connection.execute(_LET_RING, {"agent": AGENT, "count": 1000})
    ended = connection.execute(_ONE_ENDED, {"agent": AGENT}).fetchone()
    assert ended
    connection.execute(_ADOPT, {"agent": AGENT, "parent": ended[0], "count": CHILDREN})
    connection.execute(_KEY, {"agent": AGENT, "task": ended[0]})
    connection.execute("VACUUM (ANALYZE) tasks")
    hand = {"count": TOGETHER_MAX}
    queued, running = (connection.execute(each, hand).fetchall() for each in (_QUEUED, _RUNNING))
    assert len(queued) == len(running) == TOGETHER_MAX
    return Sample([row[0] for row in queued], running, *ended)


_ENLIST = """
    INSERT INTO workers (worker_id, name, agent, host, pid, boot_id, pid_namespace,
                         process_started_at, slots)
    VALUES (%(id)s, %(agent)s || '@host', %(agent)s, 'host', 1, 'boot', 'namespace', 0, 2)
"""
_LET_RUN = """
    UPDATE tasks SET state = 'running', attempt = 1, claim_id = gen_random_uuid(),
        worker = %(agent)s || '@host', worker_id = %(id)s, started_at = now(), next_ring_at = NULL,
        lease_expires_at = now() + interval '30 s'
    WHERE task_id IN (SELECT task_id FROM tasks WHERE agent = %(agent)s AND state = 'queued'
                      AND rings = 0 ORDER BY priority DESC, task_id LIMIT %(count)s)
"""
_LET_RING = """
    UPDATE tasks SET rings = 1, next_ring_at = now() + interval '15 s'
    WHERE task_id IN (SELECT task_id FROM tasks WHERE agent = %(agent)s AND state = 'queued'
                      AND rings = 0 ORDER BY priority DESC, task_id LIMIT %(count)s)
"""
_ADOPT = """
    UPDATE tasks SET parent_id = %(parent)s
    WHERE task_id IN (SELECT task_id FROM tasks
                      WHERE agent = %(agent)s AND finished_at IS NOT NULL AND task_id <> %(parent)s
                      ORDER BY finished_at DESC LIMIT %(count)s)
"""
_KEY = """
    INSERT INTO idempotency_keys (principal, agent, key, task_id, fingerprint)
    VALUES ('', %(agent)s, 'a key', %(task)s, 'x')
"""
_QUEUED = """
    SELECT task_id FROM tasks WHERE state = 'queued' AND rings > 0
    ORDER BY priority DESC, task_id LIMIT %(count)s
"""
_RUNNING = """
    SELECT task_id, claim_id FROM tasks WHERE state = 'running'
    ORDER BY priority DESC, task_id LIMIT %(count)s
"""
_ONE_ENDED = """
    SELECT task_id, finished_at FROM tasks WHERE agent = %(agent)s AND finished_at IS NOT NULL
    ORDER BY finished_at DESC OFFSET 1000 LIMIT 1
"""


def _row(task_id: UUID) -> dict[str, Any]:
    return {
        "task_id": task_id,
        "agent": AGENT,
        "action": "echo",
        "params": {"number": 1},
        "priority": 5,
        "max_attempts": 1,
        "time_limit_s": 60.0,
        "rerun_after_crash": True,
        "source": "api",
    }


def wanted(sample: Sample) -> Mapping[str, Executable | db.Ready]:
    """Return every statement on tables that grow, by name; what runs most often comes first."""
    return {**_often(sample), **_seldom(sample)}


def _often(sample: Sample) -> dict[str, Executable | db.Ready]:
    """Return what fronts, workers and relays run for each task, each pass and each look."""
    queued, attempt = sample.queued[0], sample.running[0]
    endings = [
        statements.Ending(*each, State.SUCCEEDED, Outcome.SUCCEEDED, 0.0, 1.0, {"number": 1})
        for each in sample.running
    ]
    page: dict[str, Any] = {"limit": 50, "agent": AGENT}
    return {
        "accept": statements.accept(_row(new_id()), rung=True),
        "accept_many of 100": statements.accept_many([_row(new_id()) for _ in range(100)]),
        "admission with a limit": statements.admission(AGENT, 10_000),
        "queue_position": statements.queue_position(new_id(), AGENT, 5),
        "claim": statements.claim(queued, **CLAIMANT, claim_id=uuid4()),
        f"claim_many of {TOGETHER_MAX}": statements.claim_many(
            {task_id: uuid4() for task_id in sample.queued}, **CLAIMANT
        ),
        "unclaimed": statements.unclaimed(queued, WORKER_ID),
        f"extend of {TOGETHER_MAX}": statements.extend(sample.running),
        "finish": statements.finish(
            *attempt, State.SUCCEEDED, Outcome.SUCCEEDED, result={"number": 1}
        ),
        f"finish_many of {TOGETHER_MAX}": statements.finish_many(endings, 2.0),
        "requeue": statements.requeue(*attempt, Outcome.RELEASED),
        "result": statements.result(sample.ended),
        "task": statements.task(sample.ended),
        "ended of 1,000": statements.ended([new_id() for _ in range(999)] + [sample.ended]),
        "followed": statements.followed(attempt[0], 0, 100),
        "tasks_page": statements.tasks_page(**page),
        "tasks_page of all agents": statements.tasks_page(limit=50),
        "tasks_page before a cursor": statements.tasks_page(
            **page, before=(sample.since, sample.ended)
        ),
        "tasks_page of succeeded ones": statements.tasks_page(**page, states=["succeeded"]),
        "tasks_page of failed ones": statements.tasks_page(**page, states=["failed"]),
        "tasks_page of running ones": statements.tasks_page(**page, states=["running"]),
        "tasks_page of cancelled ones": statements.tasks_page(**page, states=["cancelled"]),
        "tasks_page of an action": statements.tasks_page(**page, action="describe"),
        "tasks_page of an action of all agents": statements.tasks_page(limit=50, action="echo"),
        "tasks_page of a label": statements.tasks_page(**page, labels={"colour": "red"}),
        "tasks_page of a frequent label": statements.tasks_page(**page, labels={"colour": "blue"}),
        "tasks_page of a label of all agents": statements.tasks_page(
            limit=50, labels={"colour": "red"}
        ),
        "tasks_page of a day": statements.tasks_page(
            **page, since=sample.since - timedelta(days=11), until=sample.since - timedelta(days=10)
        ),
        "replayable": statements.replayable(agent=AGENT, state="failed", limit=1000),
        "replayable of a code": statements.replayable(
            agent=AGENT, state="failed", code="poison", limit=1000
        ),
        "replayable cancelled ones": statements.replayable(
            agent=AGENT, state="cancelled", limit=1000
        ),
        "tasks_page of a parent": statements.tasks_page(limit=50, parent_id=sample.ended),
        "status": statements.status([AGENT, *OTHERS]),
        "activity": statements.activity([AGENT, *OTHERS], 60.0),
        "claimable": statements.claimable(AGENT, "host", WORKER_ID, 60.0),
        "busy_agents": statements.busy_agents(),
        "become_due": statements.become_due(1000),
        "wake_keys": statements.wake_keys(),
        "ring_unrung of 100": statements.ring_unrung(AGENT, 100),
        "ring_overdue": statements.ring_overdue(AGENT, 1000),
        "ring_overdue on an empty queue": statements.ring_overdue(AGENT, 1000, empty=range(10)),
        "ring_again of an agent": statements.ring_again(AGENT),
        "ring_afresh": statements.ring_afresh(AGENT),
        "ring_children": statements.ring_children([sample.ended]),
        "ring_put_off": statements.ring_put_off(AGENT),
        "ring_failed": statements.ring_failed([queued]),
        "past_deadline": statements.past_deadline(500),
        "lease_expired": statements.lease_expired(1000),
        "prune": statements.prune({AGENT: RETENTION}, otherwise=RETENTION, limit=1000),
        "prune_ticks": statements.prune_ticks(after=timedelta(days=1), limit=1000),
        "prune of 1,000": statements.prune(
            {OTHERS[0]: timedelta(days=1)}, otherwise=RETENTION, limit=1000
        ),
        "prune_concurrency_keys": statements.prune_concurrency_keys(1000),
        "take_callbacks": statements.take_callbacks(10, 30.0),
        "beat": statements.beat(WORKER_ID, running=1, slots=2, consuming=True, claims=10),
        "serve": statements.serve("relay", "here"),
    }


def _seldom(sample: Sample) -> dict[str, Executable | db.Ready]:
    """Return what is for keys, families, cancelling, progress, doubtful ends and rescue."""
    queued, attempt = sample.queued[0], sample.running[0]
    ending = statements.Ending(*attempt, State.SUCCEEDED, Outcome.SUCCEEDED, 0.0, 1.0)
    own_key = {"principal": "", "idempotency_key": "another key", "fingerprint": "x"}
    return {
        "accept with a key": statements.accept({**_row(new_id()), **own_key}, rung=True),
        "reserve_keys of 100": statements.reserve_keys(
            [{**_row(new_id()), **own_key, "idempotency_key": str(number)} for number in range(100)]
        ),
        "keyed": statements.keyed("", AGENT, "a key"),
        "forget_key": statements.forget_key("", AGENT, "a key", sample.ended),
        "running_of_key": statements.running_of_key(AGENT, "a key"),
        "unfinished_of_key": statements.unfinished_of_key(AGENT, "a key"),
        "hold": statements.hold(queued),
        "wake_key": statements.wake_key(AGENT, "a key"),
        "claim_of_key": statements.claim_of_key(queued, **CLAIMANT, claim_id=uuid4()),
        "claimed": statements.claimed(dict(sample.running)),
        "neighbours": statements.neighbours(queued, WORKER_ID),
        "put_off": statements.put_off(queued),
        "count_rung": statements.count_rung(AGENT),
        "child_of": statements.child_of(sample.ended, 1),
        "parent_of": statements.parent_of(queued),
        "family_of": statements.family_of(sample.ended),
        "wait_for_child": statements.wait_for_child(*attempt, new_id()),
        "advance_parent": statements.advance_parent(sample.ended, sample.ended),
        "progress": statements.progress(*attempt, 0.5, "half of it"),
        "tell_lines of 100": statements.tell_lines(*attempt, [{"message": "x"}] * 100),
        "told_lines": statements.told_lines(attempt[0]),
        "cancellation": statements.cancellation(*attempt),
        "cancel": statements.cancel([queued]),
        "cancel_requested": statements.cancel_requested(attempt[0]),
        "end_queued": statements.end_queued([queued], State.CANCELLED, {"code": "cancelled"}),
        "queued_of": statements.queued_of(queued, AGENT, "echo"),
        "lock": statements.lock(sample.queued),
        "charge": statements.charge(attempt[0]),
        "outcome_of": statements.outcome_of(*attempt),
        "outcomes_of": statements.outcomes_of([ending]),
        "running_claim": statements.running_claim(*attempt),
        "running_on": statements.running_on([WORKER_ID]),
        "unfinished_of_schedule": statements.unfinished_of_schedule("hourly"),
        "settle_callback": statements.settle_callback(
            sample.ended, 1, settled=True, error=None, pause=timedelta(0)
        ),
    }


def _explain(wanted: Executable | db.Ready) -> list[str]:
    """Return the plan of a statement as it ran the second time."""
    plan: list[str] = []
    engine = create_engine(db.url())

    @event.listens_for(engine, "before_cursor_execute")
    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *more: Any) -> None:
        # As the driver gets it: the parameters are converted by now.
        for _ in range(2):
            cursor.execute("SAVEPOINT untouched")
            cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS) {statement}", parameters)
            plan[:] = [row[0] for row in cursor.fetchall()]
            cursor.execute("ROLLBACK TO untouched")

    with engine.connect() as connection:
        if isinstance(wanted, db.Ready):
            connection.execute(*wanted)
        else:
            connection.execute(wanted)
        connection.rollback()
    engine.dispose()
    return plan


def _anchor(name: str) -> str:
    return re.sub(r"[^\w -]", "", name).replace(" ", "-").lower()


def _time(plan: Sequence[str]) -> str:
    [found] = [line for line in plan if line.startswith("Execution Time")]
    return found.removeprefix("Execution Time: ")


def _pages(plan: Sequence[str]) -> int:
    """Return how many pages the whole statement has looked at: those of its outermost node."""
    line = next((line for line in plan if line.lstrip().startswith("Buffers: shared")), "")
    return sum(int(pages) for pages in re.findall(r"(?:hit|read)=(\d+)", line))


def _scans(plan: Sequence[str]) -> str:
    """Name the ways into tables, whole reads of the large one first."""
    seen: dict[str, None] = {}
    for line in plan:
        if "never executed" in line:
            continue
        if whole := re.search(r"Seq Scan on (tasks|attempts)\b", line):
            seen[f"**all of {whole[1]}**"] = None
        elif index := re.search(r"(?:using|Index Scan on) ((?:tasks|attempts)_\w+)", line):
            seen[index[1]] = None
    return ", ".join(sorted(seen)) or "–"


if __name__ == "__main__":
    main(sys.argv[1:])
