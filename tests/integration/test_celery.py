"""What the `celery` command, `.delay()` and Flower do through our application, without a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import chain, chord, group
from sqlalchemy import func, select

from sutazai import db
from sutazai.errors import InvalidInput, SutazaiError, UnknownAction, UnknownAgent
from sutazai.models import tasks
from tests.conftest import Servers

AGENT = "task-assignment-coordinator"
NAME = f"{AGENT}.describe"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def celery(database: Servers) -> Run:
    """Run the `celery` command to its end."""
    env = os.environ | {
        "SUTAZAI_HOME": str(database.home),
        "SUTAZAI_DATABASE_URL": database.database_url,
        "SUTAZAI_BROKER_URL": database.broker_url,
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "celery"), "-A", "sutazai", *arguments]
        return subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, timeout=60
        )

    return run


@pytest.fixture
def app(database: Servers) -> Iterator[Any]:
    from sutazai.celery import app, bell

    yield app
    bell().close()


def rows() -> int:
    count: int = db.run(select(func.count()).select_from(tasks))[0][0]
    return count


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nope.nope", UnknownAgent, "no agent 'nope'"),
        ("nope", UnknownAgent, "no agent 'nope'"),
        (f"{AGENT}.descirbe", UnknownAction, "has no action 'descirbe'; it has: describe"),
    ],
)
def test_a_misspelt_name_is_refused_and_nothing_is_sent(
    database: Servers, app: Any, name: str, error: type[SutazaiError], message: str
) -> None:
    with pytest.raises(error, match=message):
        app.send_task(name)
    assert rows() == 0
    with redis.Redis.from_url(database.broker_url) as client:
        assert not client.keys("*")


def test_the_command_says_in_one_line_what_is_misspelt(celery: Run) -> None:
    refused = celery("call", "nope.nope")
    assert refused.returncode == 1
    assert refused.stderr.startswith("sutazai: There is no agent 'nope'; there are: ")
    assert len(refused.stderr.splitlines()) == 1


def test_tasks_that_would_start_others_are_refused(app: Any) -> None:
    describe = app.tasks[NAME]
    one = describe.si()
    for send in (
        lambda: describe.apply_async(link=one),
        lambda: describe.apply_async(link_error=[one]),
        chain(one, one).apply_async,
        chord([one, one], one).apply_async,
    ):
        with pytest.raises(InvalidInput, match="cannot be sent with"):
            send()
    assert rows() == 0
    describe.apply_async(link=[], link_error=None, chain=None, chord=None)
    group(one, one).apply_async()
    assert rows() == 3


# --- revoke and terminate -------------------------------------------------------------------


def state(task_id: str) -> str:
    [found] = db.run(select(tasks.c.state).where(tasks.c.task_id == task_id))
    return str(found.state)


def test_revoking_cancels_while_no_worker_lives(celery: Run, app: Any) -> None:
    for arguments in (("revoke",), ("terminate", "KILL")):
        ids = [app.send_task(NAME).id for _ in range(2)]
        told = celery("control", *arguments, *ids, "nonsense")
        assert (told.returncode, "No nodes replied" in told.stderr) == (69, True)
        assert [state(task_id) for task_id in ids] == ["cancelled"] * 2


@pytest.mark.parametrize("terminate", [False, True])
def test_flowers_buttons_cancel_while_no_worker_lives(app: Any, terminate: bool) -> None:
    sent = app.send_task(NAME)
    app.control.revoke(sent.id, terminate=terminate, signal="SIGTERM")  # as Flower calls it
    assert sent.state == "REVOKED"
    again = app.send_task(NAME)
    again.revoke(terminate=terminate)
    assert state(again.id) == "cancelled"
    third = app.send_task(NAME)
    app.control.terminate([third.id])
    assert state(third.id) == "cancelled"
