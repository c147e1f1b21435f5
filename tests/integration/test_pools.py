"""Workers of each kind of pool, as processes of their own, that run too long, hang or stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from sqlalchemy import func, select, text, update

from sutazai import admission, db, lifecycle, statements
from sutazai.agent import Agent
from sutazai.keeper import LIMIT_GRACE_S
from sutazai.models import tasks, workers
from sutazai.relay import Relay
from sutazai.submission import Options, Submission
from tests.conftest import Servers
from tests.integration import pools
from tests.integration.served import until

POOLS = [pools.prefork, pools.threads, pools.solo]

Start = Callable[[Agent], subprocess.Popen[bytes]]


@pytest.fixture
def start(database: Servers, tmp_path: Path) -> Iterator[Start]:
    """Start a worker of an agent and wait until it consumes; its log is `tmp_path / "log"`."""
    references = ",".join(
        f"tests.integration.pools:{name}" for name in ("prefork", "threads", "solo")
    )
    env = os.environ | {
        "SUTAZAI_HOME": str(database.home),
        "SUTAZAI_DATABASE_URL": database.database_url,
        "SUTAZAI_BROKER_URL": database.broker_url,
        "SUTAZAI_AGENTS": references,
    }

    @contextmanager
    def started(agent: Agent) -> Iterator[subprocess.Popen[bytes]]:
        with (tmp_path / "log").open("ab") as log:
            command = [sys.executable, "-m", "tests.integration.pools", agent.name]
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)

    def consumes(agent: Agent, pid: int) -> bool:
        known = db.run(select(workers).where(workers.c.agent == agent.name))
        return any(row.pid == pid and row.consuming for row in known)

    with ExitStack() as stack:

        def start(agent: Agent) -> subprocess.Popen[bytes]:
            process = stack.enter_context(started(agent))
            until(lambda: consumes(agent, process.pid), 60)
            return process

        yield start


@pytest.fixture
def relay(database: Servers) -> Iterator[Relay]:
    from sutazai.celery import bell

    yield Relay(bell())
    bell().close()


def accept(agent: Agent, action: str, **params: Any) -> UUID:
    with db.transaction() as connection:
        submission = Submission(agent.get(action), params, Options())
        return admission.accept(connection, submission, rung=False).task_id


def row(task_id: UUID) -> Any:
    return db.run(statements.task(task_id))[0]


def outcomes(task_id: UUID) -> list[str]:
    return [attempt["outcome"] for attempt in row(task_id).attempts]


def charges(task_id: UUID) -> tuple[int, int]:
    found = select(tasks.c.failures, tasks.c.crashes).where(tasks.c.task_id == task_id)
    failures, crashes = db.run(found)[0]
    return failures, crashes


def tell(command: str) -> None:
    """Send a command to the worker, once it listens: one that is sent before is lost."""
    from sutazai.celery import app

    until(lambda: app.control.ping(timeout=0.5), 60)
    app.control.broadcast(command)


def rung_until(relay: Relay, condition: Callable[[], Any]) -> None:
    until(lambda: relay.round() is not None and condition(), 60)


@pytest.mark.parametrize("agent", POOLS, ids=lambda agent: agent.pool)
def test_an_action_that_never_ends_is_ended_at_its_limit_in_every_pool(
    start: Start, relay: Relay, agent: Agent
) -> None:
    worker = start(agent)
    neighbour = accept(agent, "nap", seconds=50) if agent.slots[1] > 1 else None
    if neighbour:
        rung_until(relay, lambda: row(neighbour).state == "running")
    task_id = accept(agent, "spin")
    rung_until(relay, lambda: row(task_id).state == "failed")
    assert row(task_id).error["code"] == "time_limit_exceeded"
    assert outcomes(task_id) == ["timed_out"]
    if agent.pool == "prefork":
        assert worker.poll() is None
        assert row(neighbour).state == "running", "only its own process is ended"
        return
    # A thread cannot be ended: the worker ends itself, and puts back what else it ran.
    until(lambda: worker.poll() is not None, 20)
    start(agent)
    if neighbour:
        rung_until(relay, lambda: row(neighbour).state == "succeeded")
        assert outcomes(neighbour) == ["released", "succeeded"]
        assert charges(neighbour) == (0, 0)


def test_an_action_is_tried_again_after_its_limit_only_if_it_says_so(
    start: Start, relay: Relay
) -> None:
    start(pools.prefork)
    task_id = accept(pools.prefork, "spin_first")
    rung_until(relay, lambda: row(task_id).state == "succeeded")
    assert outcomes(task_id) == ["timed_out", "succeeded"]
    assert charges(task_id) == (1, 0)
    task_id = accept(pools.prefork, "spin_first")
    db.run(update(tasks).where(tasks.c.task_id == task_id).values(rerun_after_crash=False))
    rung_until(relay, lambda: row(task_id).state == "failed")
    assert row(task_id).error["code"] == "time_limit_exceeded"


def test_what_must_not_run_twice_fails_when_its_worker_has_to_end_itself(
    start: Start, relay: Relay
) -> None:
    worker = start(pools.threads)
    once = accept(pools.threads, "nap_once", seconds=50)
    rung_until(relay, lambda: row(once).state == "running")
    accept(pools.threads, "spin")
    rung_until(relay, lambda: worker.poll() is not None)
    assert (row(once).state, row(once).error["code"]) == ("failed", "worker_lost")
    assert outcomes(once) == ["lost"]


@pytest.mark.parametrize("agent", POOLS, ids=lambda agent: agent.pool)
def test_an_action_that_ignores_its_cancellation_is_ended_in_every_pool(
    start: Start, relay: Relay, agent: Agent
) -> None:
    start(agent)
    task_id = accept(agent, "nap", seconds=50)
    rung_until(relay, lambda: row(task_id).state == "running")
    with db.transaction() as connection:
        lifecycle.cancel(connection, task_id)
    rung_until(relay, lambda: row(task_id).state == "cancelled")
    assert outcomes(task_id) == ["cancelled"]


@pytest.mark.parametrize("agent", POOLS, ids=lambda agent: agent.pool)
def test_a_worker_that_stops_puts_long_tasks_back_uncharged_in_every_pool(
    start: Start, relay: Relay, agent: Agent
) -> None:
    worker = start(agent)
    task_id = accept(agent, "nap", seconds=50)
    rung_until(relay, lambda: row(task_id).state == "running")
    worker.send_signal(signal.SIGTERM)
    worker.wait(30)
    assert row(task_id).state == "queued"
    start(agent)
    rung_until(relay, lambda: row(task_id).state == "succeeded")
    assert outcomes(task_id) == ["released", "succeeded"]
    assert charges(task_id) == (0, 0)


def test_a_worker_whose_main_thread_hangs_ends_itself_and_its_task_runs_on_the_next(
    start: Start, relay: Relay, tmp_path: Path
) -> None:
    hung = start(pools.prefork)
    tell("hang")
    task_id = accept(pools.prefork, "nap", seconds=0)
    rung_until(relay, lambda: hung.poll() is not None)
    assert hung.returncode == -signal.SIGKILL
    assert "does not consume" in (tmp_path / "log").read_text()
    assert row(task_id).state == "queued"
    start(pools.prefork)
    rung_until(relay, lambda: row(task_id).state == "succeeded")
    assert outcomes(task_id) == ["succeeded"]


def test_a_worker_whose_main_thread_fails_ends_at_once_and_puts_back_what_it_runs(
    start: Start, relay: Relay
) -> None:
    failed = start(pools.prefork)
    task_id = accept(pools.prefork, "nap", seconds=50)
    rung_until(relay, lambda: row(task_id).state == "running")
    tell("fail")
    until(lambda: failed.poll() is not None, 5)
    assert row(task_id).state == "queued"
    start(pools.prefork)
    rung_until(relay, lambda: row(task_id).state == "succeeded")
    assert outcomes(task_id) == ["released", "succeeded"]
    assert charges(task_id) == (0, 0)


def test_a_pool_that_never_stops_holds_up_no_drain(start: Start, relay: Relay) -> None:
    worker = start(pools.prefork)
    tell("cling")
    task_id = accept(pools.prefork, "nap", seconds=1)
    rung_until(relay, lambda: row(task_id).state == "running")
    worker.send_signal(signal.SIGTERM)
    rung_until(relay, lambda: row(task_id).state == "succeeded")
    until(lambda: worker.poll() is not None, 15)


def test_long_tasks_stay_in_the_broker_until_a_slot_is_free(start: Start, relay: Relay) -> None:
    from sutazai.celery import app, bell

    start(pools.prefork)
    for _ in range(8):
        accept(pools.prefork, "nap", seconds=60)
    running = select(func.count()).where(tasks.c.state == "running")
    rung = select(func.count()).where(tasks.c.state == "queued", tasks.c.rings > 0)
    rung_until(relay, lambda: (db.run(running)[0][0], db.run(rung)[0][0]) == (2, 6))
    until(lambda: bell().depth(pools.prefork.name) == 6)
    until(lambda: app.control.ping(timeout=0.5), 60)  # the worker's loop has gone round meanwhile
    assert bell().depth(pools.prefork.name) == 6, "for whoever is free, and behind what is urgent"


def test_a_process_that_dies_before_its_claim_costs_a_moment(start: Start, relay: Relay) -> None:
    from sutazai.celery import bell

    worker = start(pools.prefork)
    relay.round()  # the first one finds a new broker, and rings everything again
    submission = Submission(pools.prefork.get("nap"), {"seconds": 0}, Options())
    with db.transaction() as connection:
        task_id = admission.accept(connection, submission, rung=True).task_id
    with db.transaction() as connection:
        connection.execute(statements.lock([task_id]))  # so that the claim waits
        bell().ring([submission.notice])
        until(lambda: db.run(CLAIMING), 20)
        for child in psutil.Process(worker.pid).children():
            child.kill()
        db.run(END_CLAIMING)  # it would claim all the same, for nobody
    rung_until(relay, lambda: row(task_id).state == "succeeded")
    found = db.run(
        select(tasks.c.started_at - tasks.c.created_at).where(tasks.c.task_id == task_id)
    )
    assert found[0][0] < timedelta(seconds=10), "not when its notice was due again, after 15 s"
    assert outcomes(task_id) == ["succeeded"]


CLAIMING = text(
    "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%claim_id%'"
)
END_CLAIMING = text(str(CLAIMING).replace("SELECT pid", "SELECT pg_terminate_backend(pid)"))


def test_an_outage_longer_than_its_limit_does_not_make_a_finished_task_late(
    start: Start, relay: Relay
) -> None:
    start(pools.prefork)
    task_id = accept(pools.prefork, "nap", seconds=0.5)
    db.run(update(tasks).values(time_limit_s=1))
    rung_until(relay, lambda: row(task_id).state == "running")
    with no_writes():
        late = select(func.now() > tasks.c.started_at + timedelta(seconds=1 + LIMIT_GRACE_S + 2))
        until(lambda: db.run(late)[0][0], 20)
    until(lambda: row(task_id).finished_at, 20)
    assert outcomes(task_id) == ["succeeded"]


@contextmanager
def no_writes() -> Iterator[None]:
    """Let PostgreSQL close every connection and take no writes."""

    def refuse(verb: str) -> None:
        with db.transaction() as connection:
            connection.execute(text("SET TRANSACTION READ WRITE"))
            connection.execute(text(f"ALTER ROLE CURRENT_USER {verb}"))
        db.run(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE usename = current_user AND pid <> pg_backend_pid()"
            )
        )
        db.dispose()

    refuse("SET default_transaction_read_only = on")
    try:
        yield
    finally:
        refuse("RESET default_transaction_read_only")
