"""A worker that lives and beats, and yet consumes nothing, on real stores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from sutazai import admission, db, statements
from sutazai.models import workers
from sutazai.relay import Relay
from sutazai.submission import Options, Submission
from tests.conftest import Servers
from tests.integration.hanging import agent
from tests.integration.served import until


@pytest.fixture
def start(database: Servers, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start a worker of the agent that can hang; its log is `tmp_path / "log"`."""
    env = os.environ | {
        "SUTAZAI_HOME": str(database.home),
        "SUTAZAI_DATABASE_URL": database.database_url,
        "SUTAZAI_BROKER_URL": database.broker_url,
        "SUTAZAI_AGENTS": "tests.integration.hanging:agent",
    }

    @contextmanager
    def started() -> Iterator[subprocess.Popen[bytes]]:
        with (tmp_path / "log").open("ab") as log:
            command = [sys.executable, "-m", "tests.integration.hanging"]
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)

    with ExitStack() as stack:
        yield lambda: stack.enter_context(started())


def test_a_worker_whose_main_thread_hangs_ends_itself_and_its_task_runs_on_the_next(
    start: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    from sutazai.celery import app, bell

    def is_consuming(process: subprocess.Popen[bytes]) -> bool:
        known = db.run(select(workers).where(workers.c.agent == agent.name))
        return any(row.pid == process.pid and row.consuming for row in known)

    def state() -> Any:
        relay.round()
        return db.run(statements.task(task_id))[0].state

    relay = Relay(bell())
    hung = start()
    until(lambda: is_consuming(hung), 60)
    app.control.broadcast("hang")
    submission = Submission(agent.get("describe"), {}, Options())
    task_id = submission.task_id
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=False)
    until(lambda: state() and hung.poll() is not None, 60)
    assert hung.returncode == -signal.SIGKILL
    assert "does not consume" in (tmp_path / "log").read_text()
    assert state() == "queued"
    start()
    until(lambda: state() == "succeeded", 60)
    attempts = db.run(statements.task(task_id))[0].attempts
    assert [attempt["outcome"] for attempt in attempts] == ["succeeded"]
    bell().close()
