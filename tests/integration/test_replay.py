"""Trying again what has ended, by route and by command, on a real PostgreSQL."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

from sutazai import admission, db, replay, statements
from sutazai.cli import app
from sutazai.errors import Conflict, InvalidInput, TaskNotFound
from sutazai.submission import Submission
from tests.integration.served import Front, agent

SAMPLER = "hardware-resource-optimizer"


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def query(sql: str, **values: Any) -> Any:
    with db.transaction() as connection:
        return connection.execute(text(sql), values)


# --- input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a b", "k" * 256])
def test_a_key_that_is_none_is_refused_wherever_a_task_is_made(front: Front, key: str) -> None:
    ended = front.client.post("/process", json={"action": "nothing"}).json()["task_id"]
    every_hour = {"name": "hourly", "action": "nothing", "every_s": 3600}
    assert front.client.post("/schedules", json=every_hour).status_code == 201
    for path, body in (
        ("/process", {"action": "nothing"}),
        ("/tasks", {"action": "nothing"}),
        (f"/tasks/{ended}/retry", {}),
        ("/schedules/hourly/run", {}),
    ):
        answer = front.client.post(path, json=body, headers={"Idempotency-Key": key})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_input"), path
        [fault] = answer.json()["details"]
        assert fault["field"].endswith("idempotency_key"), path


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("tasks", "retry", "--agent", SAMPLER, "--rate", "20000"), "rate_per_s"),
        (("submit", SAMPLER, "get_metrics", "--idempotency-key", "a b"), "idempotency_key"),
        (("schedule", "add", "x", SAMPLER, "get_metrics", "--every", "0.5"), "every_s"),
    ],
)
def test_a_command_names_the_option_that_it_cannot_take(
    arguments: tuple[str, ...], field: str
) -> None:
    raised = command(*arguments).exception
    assert isinstance(raised, InvalidInput)
    assert str(raised).startswith(f"{field}: ")


# --- what is tried again --------------------------------------------------------------------


def end(task_id: UUID, state: str = "failed", child_id: UUID | None = None) -> None:
    query(
        "UPDATE tasks SET state = :state, finished_at = now(), next_ring_at = NULL, "
        """child_id = :child_id, error = '{"code": "task_failed", "message": "x"}' """
        "WHERE task_id = :task_id",
        task_id=task_id,
        state=state,
        child_id=child_id,
    )


@pytest.mark.usefixtures("database")
def test_delegated_work_is_replayed_with_its_parent_only() -> None:
    parent, delegated, started = (
        Submission(agent.get("nothing"), {}),
        *(Submission(agent.get("nothing"), {}, call_index=index) for index in (1, 2)),
    )
    children = [replace(child, parent_id=parent.task_id) for child in (delegated, started)]
    with db.transaction() as connection:
        for submission in (parent, *children):
            admission.accept(connection, submission, rung=True)
    for submission in (parent, *children):
        end(submission.task_id, child_id=delegated.task_id if submission is parent else None)
    with db.transaction() as connection:
        made = replay.repeat_many(
            connection, replay.Filter(), {agent.name: agent}, default_agent=agent.name
        )
    found = query("SELECT retry_of FROM tasks WHERE task_id = ANY(:made)", made=made).scalars()
    assert set(found) == {parent.task_id, started.task_id}


@pytest.mark.usefixtures("database")
def test_one_task_is_tried_again_by_command_as_by_route() -> None:
    waiting = command("submit", SAMPLER, "get_metrics", "--no-wait")
    task_id = json.loads(waiting.output)["task_id"]
    assert isinstance(command("tasks", "retry", task_id).exception, Conflict)
    end(UUID(task_id), "cancelled")
    [made] = json.loads(command("tasks", "retry", task_id).output)["task_ids"]
    row = query("SELECT retry_of, state FROM tasks WHERE task_id = :made", made=made).one()
    assert (str(row.retry_of), row.state) == (task_id, "queued")
    assert isinstance(command("tasks", "retry", str(uuid4())).exception, TaskNotFound)


@pytest.mark.usefixtures("database")
def test_what_was_for_a_host_is_tried_again_there() -> None:
    bound = [Submission(agent.get("nothing"), {}, host="there") for _ in range(2)]
    with db.transaction() as connection:
        for submission in bound:
            admission.accept(connection, submission, rung=True)
    for submission in bound:
        end(submission.task_id)
    agents = {agent.name: agent}
    with db.transaction() as connection:
        again = replay.repeat_one(connection, bound[0].task_id, agents)
        assert (again.host, again.notice.host) == ("there", "there")
        admission.accept(connection, again, rung=True)
        replay.repeat_many(connection, replay.Filter(agent=agent.name), agents)
    hosts = query("SELECT host FROM tasks WHERE retry_of IS NOT NULL").scalars().all()
    assert hosts == ["there", "there"]


# --- queues ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("database")
def test_a_queue_is_not_resumed_by_halves(monkeypatch: pytest.MonkeyPatch, front: Front) -> None:
    """Notices that came while it was paused did nothing: resuming without ringing is none."""
    assert front.client.post("/queue/pause").json()["paused"]
    broken = text("SELECT 1 / 0")
    with monkeypatch.context() as patched:
        patched.setattr(statements, "ring_afresh", lambda agent: (broken,))
        assert front.client.post("/queue/resume").status_code == 500
    assert front.client.get("/queue").json()["paused"]
    assert not front.client.post("/queue/resume").json()["paused"]
