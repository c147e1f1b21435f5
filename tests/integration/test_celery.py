"""What the `celery` command, `.delay()` and Flower do through our application, without a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from celery import chain, chord, group
from kombu import Connection
from sqlalchemy import func, select

from sutazai import db
from sutazai.errors import InvalidInput, SutazaiError, UnknownAction, UnknownAgent
from sutazai.models import tasks
from tests.conftest import Servers, free_port
from tests.integration.served import until

AGENT = "task-assignment-coordinator"
NAME = f"{AGENT}.describe"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def env(database: Servers) -> dict[str, str]:
    return os.environ | {
        "SUTAZAI_HOME": str(database.home),
        "SUTAZAI_DATABASE_URL": database.database_url,
        "SUTAZAI_BROKER_URL": database.broker_url,
    }


@pytest.fixture
def celery(env: dict[str, str]) -> Run:
    """Run the `celery` command to its end."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "celery"), "-A", "sutazai", *arguments]
        return subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, timeout=60
        )

    return run


@pytest.fixture
def flower(env: dict[str, str], tmp_path: Path) -> Iterator[httpx.Client]:
    """Start Flower; what it logs is in `tmp_path / "log"`."""
    port = free_port()
    command = [sys.executable, "-m", "sutazai", "flower", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:

        def answers() -> bool:
            with suppress(httpx.TransportError):
                return client.get("/healthcheck").is_success
            return False

        try:
            until(answers, 60)
            yield client
        finally:
            process.terminate()
            process.wait(30)


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


def test_publishing_uses_one_client_until_its_connections_are_given_up(
    database: Servers,
) -> None:
    # Named in full: kombu remembers what `redis` meant when it was first used in this process.
    with Connection(database.broker_url, transport="sutazai.transport:Transport") as connection:
        channel = connection.default_channel
        with channel.conn_or_acquire() as first, channel.conn_or_acquire() as second:
            assert second is first
        channel._disconnect_pools()  # as after a fork, or when the broker has gone
        with channel.conn_or_acquire() as another:
            assert another is not first
            assert another.ping()


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


def test_python_revokes_while_no_worker_lives(app: Any) -> None:
    first, second, third = (app.send_task(NAME) for _ in range(3))
    first.revoke()
    second.revoke(terminate=True)
    app.control.terminate([third.id])
    assert [sent.state for sent in (first, second, third)] == ["REVOKED"] * 3


def test_flowers_buttons_cancel_while_no_worker_lives(flower: httpx.Client) -> None:
    forms: list[dict[str, str]] = [{}, {"terminate": "true"}]
    for form in forms:
        task_id = flower.post(f"/api/task/send-task/{NAME}").json()["task-id"]
        assert flower.post(f"/api/task/revoke/{task_id}", data=form).status_code == 200
        assert state(task_id) == "cancelled"
    refused = flower.post("/api/task/send-task/nope.nope")
    assert (refused.status_code, refused.text) == (500, "")
    assert rows() == len(forms)
