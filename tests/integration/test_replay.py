"""Trying again what has ended, by route and by command, on a real PostgreSQL."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

from sutazai import db
from sutazai.cli import app
from sutazai.errors import InvalidInput
from tests.integration.served import Front

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
