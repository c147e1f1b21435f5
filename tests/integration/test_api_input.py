"""What clients send beside the schemas: raw bytes, headers, queries and addresses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.served import Front


def refused(front: Front, method: str, path: str, **sent: Any) -> Any:
    answer = front.client.request(method, path, **sent)
    assert answer.status_code < 500, answer.text
    body = answer.json()
    assert (body["status"], body["task_id"]) == ("error", None)
    return answer.status_code, body["code"]


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=1",
        "application/openmetrics-text; version=one.two",
        "application/openmetrics-text; version=, text/plain; version=1..0",
    ],
)
def test_metrics_are_given_to_those_who_ask_for_no_version_there_is(
    front: Front, accept: str
) -> None:
    answer = front.client.get("/metrics", headers={"Accept": accept})
    assert answer.status_code == 200, answer.text
    assert "agent_requests_total" in answer.text


@pytest.mark.parametrize("after", ["0" * 5000, "0" * 20 + "9" * 30, "9" * 19])
def test_an_event_id_is_no_longer_than_ours(front: Front, after: str) -> None:
    path = f"/tasks/{front.queue()}/events"
    sent = {"Last-Event-ID": after}
    assert refused(front, "GET", path, headers=sent) == (422, "invalid_input")


def test_a_retry_under_a_malformed_key_is_refused(front: Front) -> None:
    task_id = front.queue()
    front.client.post(f"/tasks/{task_id}/cancel")
    sent = {"Idempotency-Key": "a b"}
    path = f"/tasks/{task_id}/retry"
    assert refused(front, "POST", path, headers=sent) == (422, "invalid_input")


def test_a_run_of_a_schedule_under_a_malformed_key_is_refused(front: Front) -> None:
    body = {"name": "nightly", "action": "nothing", "every_s": 86_400}
    assert front.client.post("/schedules", json=body).status_code == 201
    sent = {"Idempotency-Key": "a b"}
    path = "/schedules/nightly/run"
    assert refused(front, "POST", path, headers=sent) == (422, "invalid_input")


@pytest.mark.parametrize("rate", [5e-324, 1e-15, 1e-9])
def test_a_replay_is_not_put_off_beyond_all_time(front: Front, rate: float) -> None:
    for _ in range(3):
        front.client.post(f"/tasks/{front.queue()}/cancel")
    body = {"state": "cancelled", "rate_per_s": rate}
    assert refused(front, "POST", "/tasks/retry", json=body) == (422, "invalid_input")


@pytest.mark.parametrize("query", ["since=0.5", "until=1700000000", "since=-1"])
def test_an_instant_is_written_out(front: Front, query: str) -> None:
    assert refused(front, "GET", f"/tasks?{query}") == (422, "invalid_input")
    body = {"action": "nothing", "options": {"run_at": query.partition("=")[2]}}
    assert refused(front, "POST", "/tasks", json=body) == (422, "invalid_input")


@pytest.mark.parametrize("path", ["/tasks/batch", "/tasks/retry"])
def test_a_wrong_method_is_told_even_where_an_id_could_stand(front: Front, path: str) -> None:
    assert refused(front, "GET", path) == (405, "method_not_allowed")
    assert front.client.get(path).headers["Allow"] == "POST"
