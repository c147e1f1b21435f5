"""A front on real stores and a real socket; a thread of the test is its bell and its worker."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import psutil
import psycopg
import pytest
import redis as redis_library
from sqlalchemy import text

from sutazai import db, payload, redis, statements
from sutazai.api import protocol
from sutazai.client import AgentClient, AsyncAgentClient
from sutazai.errors import (
    InvalidInput,
    TaskFailed,
    TaskNotFound,
    TimeLimitExceeded,
    Unavailable,
    UnknownAction,
)
from sutazai.keeper import Identity
from tests.integration.served import (
    Front,
    agent,
    until,
)


def count_tasks() -> int:
    with db.transaction() as connection:
        return int(connection.execute(text("SELECT count(*) FROM tasks")).scalar_one())


# --- POST /process --------------------------------------------------------------------------


def test_the_answer_is_flat(front: Front) -> None:
    answer = front.client.post("/process", json={"action": "add", "first": 40, "second": 2})
    assert answer.status_code == 200
    body = answer.json()
    assert list(body) == ["status", "task_id", "action", "total"]
    assert (body["status"], body["action"], body["total"]) == ("success", "add", 42)
    task = front.client.get(f"/tasks/{body['task_id']}").json()
    assert task["result"] == {"total": 42}


@pytest.mark.parametrize(
    ("how", "status", "code", "retryable"),
    [
        ("plain", 500, "task_failed", True),
        ("late", 504, "time_limit_exceeded", True),
        ("cancelled", 409, "task_cancelled", False),
    ],
)
def test_a_failed_task_is_told_from_a_failed_front(
    front: Front, how: str, status: int, code: str, retryable: bool
) -> None:
    answer = front.client.post("/process", json={"action": "fail", "how": how})
    body = answer.json()
    assert (answer.status_code, body["status"], body["code"]) == (status, "error", code)
    assert body["retryable"] is retryable
    assert UUID(body["task_id"])
    assert "Traceback" not in answer.text


def test_respond_async_does_not_wait(front: Front) -> None:
    front.bell.paused = True
    answer = front.client.post(
        "/process", json={"action": "nothing"}, headers={"Prefer": "respond-async"}
    )
    assert answer.status_code == 202
    body = answer.json()
    assert list(body) == ["status", "task_id", "state", "queue_position", "links"]
    assert (body["status"], body["state"]) == ("accepted", "queued")
    assert isinstance(body["queue_position"], int)
    assert answer.headers["location"] == body["links"]["self"] == f"/tasks/{body['task_id']}"
    assert answer.headers["preference-applied"] == "respond-async"
    assert front.client.get(answer.headers["location"]).json()["state"] == "queued"


def test_when_the_wait_runs_out_the_task_goes_on(front: Front) -> None:
    front.bell.paused = True
    began = time.monotonic()
    answer = front.client.post(
        "/process", json={"action": "nothing"}, headers={"Prefer": "respond-async, wait=1"}
    )
    assert answer.status_code == 202
    assert 0.9 < time.monotonic() - began < 5
    assert answer.headers["preference-applied"] == "respond-async, wait=1"
    task_id = answer.json()["task_id"]
    front.bell.perform(agent.name, "nothing", UUID(task_id))
    assert front.client.get(f"/tasks/{task_id}").json()["state"] == "succeeded"


def test_query_becomes_options(front: Front) -> None:
    front.bell.paused = True
    answer = front.client.post(
        "/process?priority=9&deadline_s=60&max_attempts=7",
        json={"action": "nothing"},
        headers={"Prefer": "respond-async"},
    )
    task = front.client.get(answer.headers["location"]).json()
    assert (task["priority"], task["max_attempts"]) == (9, 7)
    left = datetime.fromisoformat(task["deadline_at"]) - datetime.now(UTC)
    assert 50 < left.total_seconds() <= 60


def test_a_body_without_action_means_the_default_one(front: Front) -> None:
    answer = httpx.post(f"{front.sampler_url}/process", json={})
    assert answer.json()["action"] == "get_metrics"
    refused = front.client.post("/process", json={})
    assert refused.status_code == 422
    assert "add, describe, fail, nothing" in refused.json()["message"]


def test_many_clients_wait_without_a_thread_or_task_each(front: Front) -> None:
    threads = threading.active_count()
    front.bell.paused = True
    request = {"url": f"{front.url}/process", "json": {"action": "nothing"}, "timeout": 30}
    with ThreadPoolExecutor(40) as pool:
        answers = [pool.submit(httpx.post, **request) for _ in range(40)]
        until(lambda: front.waiting.count == 40)
        until(lambda: count_tasks() == 40)
        assert threading.active_count() <= threads + 40 + 2
        with db.transaction() as connection:
            ids = connection.execute(text("SELECT task_id FROM tasks")).scalars().all()
        for task_id in ids:
            front.bell.perform(agent.name, "nothing", task_id)
        assert [answer.result().status_code for answer in answers] == [200] * 40
    assert front.waiting.count == 0


def test_without_a_signal_polling_finds_the_end(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis, "announce", lambda *_, **__: None)
    began = time.monotonic()
    assert front.client.post("/process", json={"action": "nothing"}).status_code == 200
    assert time.monotonic() - began < 5


def test_signals_wake_sooner_than_polling(front: Front) -> None:
    front.client.post("/process", json={"action": "nothing"})
    took = []
    for _ in range(20):
        began = time.monotonic()
        assert front.client.post("/process", json={"action": "nothing"}).status_code == 200
        took.append(time.monotonic() - began)
    assert sorted(took)[10] < 0.08


# --- /tasks ---------------------------------------------------------------------------------

FIELDS = (
    "task_id agent action state priority params result error progress attempt max_attempts "
    "parent_id retry_of scheduled_by labels idempotency_key created_at run_at started_at "
    "finished_at deadline_at cancel_requested_at wait_seconds run_seconds attempts links"
)


def test_task_json_has_exactly_the_documented_fields(front: Front) -> None:
    task_id = front.queue(options={"labels": {"colour": "red"}, "priority": 7})
    task = front.client.get(f"/tasks/{task_id}").json()
    assert list(task) == FIELDS.split()
    assert (task["state"], task["priority"], task["labels"]) == ("queued", 7, {"colour": "red"})
    assert task["params"] == {"first": 1}
    assert task["attempts"] == []
    assert task["created_at"].endswith("Z")
    front.bell.perform(agent.name, "add", UUID(task_id))
    task = front.client.get(f"/tasks/{task_id}").json()
    assert (task["state"], task["result"], task["attempt"]) == ("succeeded", {"total": 1}, 1)
    [attempt] = task["attempts"]
    assert list(attempt) == ["attempt", "worker", "started_at", "ended_at", "outcome", "error"]
    assert (attempt["worker"], attempt["outcome"]) == ("test-front@here", "succeeded")
    assert all(attempt[name].endswith("Z") for name in ("started_at", "ended_at"))
    assert task["run_seconds"] >= 0
    schema = front.client.get("/openapi.json").json()["components"]["schemas"]["Task"]
    assert schema["required"] == FIELDS.split()


def test_the_running_attempt_is_shown(front: Front) -> None:
    task_id = UUID(front.queue())
    claim(task_id)
    task = front.client.get(f"/tasks/{task_id}").json()
    assert task["state"] == "running"
    [attempt] = task["attempts"]
    assert (attempt["attempt"], attempt["worker"]) == (1, "w@h")
    assert attempt["started_at"] == task["started_at"]
    assert (attempt["ended_at"], attempt["outcome"]) == (None, None)


def claim(task_id: UUID) -> None:
    with db.transaction() as connection:
        row = connection.execute(
            *statements.claim(
                task_id,
                agent=agent.name,
                action="add",
                claim_id=uuid4(),
                worker="w@h",
                worker_id=uuid4(),
                host="h",
            )
        ).first()
    assert row is not None


def test_a_task_is_waited_for(front: Front) -> None:
    task_id = front.queue()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(front.client.get, f"/tasks/{task_id}?wait=20")
        until(lambda: front.waiting.count == 1)
        front.bell.perform(agent.name, "add", UUID(task_id))
        assert answer.result().json()["state"] == "succeeded"
    began = time.monotonic()
    assert front.client.get(f"/tasks/{task_id}?wait=20").status_code == 200
    assert time.monotonic() - began < 5


def test_a_wait_that_runs_out_answers_the_task_as_it_is(front: Front) -> None:
    task_id = front.queue()
    answer = front.client.get(f"/tasks/{task_id}?wait=0.3")
    assert (answer.status_code, answer.json()["state"]) == (200, "queued")
    for bad in ("-1", "301", "soon", "nan"):
        assert front.client.get(f"/tasks/{task_id}?wait={bad}").status_code == 422
    assert front.client.get(f"/tasks/{uuid4()}?wait=1").status_code == 404


def test_any_front_shows_any_task(front: Front) -> None:
    task_id = front.queue()
    assert httpx.get(f"{front.sampler_url}/tasks/{task_id}").json()["agent"] == agent.name
    assert httpx.get(f"{front.sampler_url}/tasks").json()["tasks"] == []
    for query in ("agent=*", "agent=test-front", "agent=test_front"):
        listed = httpx.get(f"{front.sampler_url}/tasks?{query}").json()["tasks"]
        assert [task["task_id"] for task in listed] == [task_id], query


def test_lists_are_paged_newest_first(front: Front) -> None:
    ids = [front.queue() for _ in range(5)]
    seen: list[str] = []
    cursor = ""
    while True:
        page = front.client.get(f"/tasks?limit=2{cursor}").json()
        seen += [task["task_id"] for task in page["tasks"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert seen == ids[::-1]
    assert list(page["tasks"][0]) == FIELDS.split()


def test_lists_are_filtered(front: Front) -> None:
    red = front.queue(options={"labels": {"colour": "red", "size": "1"}})
    blue = front.queue(options={"labels": {"colour": "blue=sky"}})
    other = front.queue(action="describe", params={})
    front.bell.perform(agent.name, "describe", UUID(other))

    def found(**query: Any) -> list[str]:
        answer = front.client.get("/tasks", params=query)
        assert answer.status_code == 200, answer.text
        return [task["task_id"] for task in answer.json()["tasks"]]

    assert found(label="colour=red") == [red]
    assert found(label=["colour=red", "size=1"]) == [red]
    assert found(label=["colour=red", "size=2"]) == []
    assert found(label="colour=blue=sky") == [blue]
    assert found(action="describe") == [other]
    assert found(state="succeeded") == [other]
    assert found(state=["succeeded", "queued"]) == [other, blue, red]
    assert found(since="2000-01-01T00:00:00Z", until="2000-01-02T00:00:00Z") == []
    assert found(since="2000-01-01T00:00:00Z") == [other, blue, red]
    assert found(parent_id=str(uuid4())) == []


def test_a_task_of_the_future_is_accepted_and_not_rung(front: Front) -> None:
    body = {"action": "nothing", "options": {"run_at": "2999-01-01T00:00:00Z"}}
    task_id = front.client.post("/tasks", json=body).json()["task_id"]
    task = front.client.get(f"/tasks/{task_id}").json()
    assert (task["state"], task["run_at"]) == ("queued", "2999-01-01T00:00:00Z")
    with db.transaction() as connection:
        row = connection.execute(text("SELECT rings, next_ring_at FROM tasks")).one()
    assert (row.rings, row.next_ring_at) == (0, None)


def test_without_a_bell_the_row_is_left_to_the_relay(front: Front) -> None:
    front.queue()
    with db.transaction() as connection:
        row = connection.execute(
            text("SELECT rings, next_ring_at <= now() AS due FROM tasks")
        ).one()
    assert (row.rings, row.due) == (0, True)


def test_queue_position_counts_those_before(front: Front) -> None:
    def position(priority: int) -> Any:
        body = {"action": "nothing", "options": {"priority": priority}}
        return front.client.post("/tasks", json=body).json()["queue_position"]

    # An estimate is at most a second old, so the ones of other tests must be.
    time.sleep(1.05)
    front.bell.paused = True
    assert [position(3) for _ in range(3)] == [0, 1, 2]
    assert position(2) == 3
    assert position(8) == 0
    with db.transaction() as connection:
        connection.execute(
            text(
                "INSERT INTO tasks (task_id, agent, action, next_ring_at) SELECT "
                "('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid, 'test-front', "
                "'nothing', now() FROM generate_series(1, 10001) n"
            )
        )
    assert position(5) is None


# --- cancelling -----------------------------------------------------------------------------


def test_cancelling(front: Front) -> None:
    queued, running = front.queue(), front.queue()
    claim(UUID(running))
    done = front.client.post(f"/tasks/{queued}/cancel")
    assert (done.status_code, done.json()["state"]) == (200, "cancelled")
    asked = front.client.post(f"/tasks/{running}/cancel")
    assert (asked.status_code, asked.json()["state"]) == (202, "running")
    assert asked.json()["cancel_requested_at"]
    again = front.client.post(f"/tasks/{queued}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    for unknown in (uuid4(), "x"):
        assert front.client.post(f"/tasks/{unknown}/cancel").status_code == 404


def test_cancelling_wakes_those_who_wait(front: Front) -> None:
    front.bell.paused = True
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(front.client.post, "/process", json={"action": "nothing"})
        until(lambda: count_tasks() == 1)
        with db.transaction() as connection:
            task_id = connection.execute(text("SELECT task_id FROM tasks")).scalar_one()
        assert httpx.post(f"{front.url}/tasks/{task_id}/cancel").status_code == 200
        refused = answer.result()
    assert (refused.status_code, refused.json()["code"]) == (409, "task_cancelled")


# --- bad input on a real connection ---------------------------------------------------------


def send(front: Front, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
    connection.request("POST", "/process", body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def test_deep_nesting_and_duplicate_keys(front: Front) -> None:
    front.bell.paused = True
    deep = b'{"action":"add","first":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert send(front, deep)[0] == 400
    assert count_tasks() == 0
    twice = b'{"action":"nothing","action":"add","first":1,"first":2}'
    status, body = send(front, twice, Prefer="respond-async")
    assert status == 202
    assert front.client.get(body["links"]["self"]).json()["params"] == {"first": 2}


class Zeros:
    """A file of so many bytes, of which none is stored."""

    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, amount: int) -> bytes:
        amount = min(amount, self.left)
        self.left -= amount
        return b"0" * amount


def test_a_huge_body_costs_no_memory(front: Front) -> None:
    size = 100 << 20
    before = psutil.Process().memory_info().rss
    status, body = send(front, Zeros(size), **{"Content-Length": str(size)})
    assert (status, body["code"]) == (413, "payload_too_large")
    status, body = send(front, (b"0" * 65_536 for _ in range(size // 65_536)))
    assert (status, body["code"]) == (413, "payload_too_large")
    assert psutil.Process().memory_info().rss - before < 16 << 20
    assert count_tasks() == 0


def test_a_connection_that_dawdles_is_closed(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "ARRIVE_WITHIN_S", 0.3)
    for first in (b"", b"GET /health/live HT", b"POST /process HTTP/1.1\r\nhost: x\r\na: "):
        with socket.create_connection(("127.0.0.1", front.port), timeout=10) as connection:
            connection.sendall(first)
            assert connection.recv(100) == b""


def test_a_body_that_dawdles_is_refused(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "ARRIVE_WITHIN_S", 0.3)
    with socket.create_connection(("127.0.0.1", front.port), timeout=10) as connection:
        connection.sendall(
            b"POST /process HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b'x-request-id: mine\r\ncontent-length: 100\r\n\r\n{"action"'
        )
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer
    assert b"x-request-id: mine" in answer.lower()
    assert 'code="408"' in front.client.get("/metrics").text


def test_a_body_that_waits_for_the_answer_before_it_is_not_late(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "ARRIVE_WITHIN_S", 1.0)
    front.bell.paused = True
    head = (
        b"POST /process HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 20\r\nprefer: wait=2\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", front.port), timeout=10) as connection:
        connection.sendall(head + b'{"action":"nothing"}' + head + b'{"action"')
        answers = connection.recv(4096)
        connection.sendall(b':"nothing"}')
        while answers.count(b"HTTP/1.1 ") < 2:
            answers += connection.recv(4096)
    assert answers.count(b"HTTP/1.1 202 ") == 2


def test_requests_sent_at_once_are_answered_in_their_order(front: Front) -> None:
    ids = [f"request-{number}" for number in range(5)]
    with socket.create_connection(("127.0.0.1", front.port), timeout=10) as connection:
        connection.sendall(
            b"".join(
                b"GET /health/live HTTP/1.1\r\nhost: x\r\nx-request-id: %s\r\n\r\n" % each.encode()
                for each in ids
            )
        )
        answers = b""
        while answers.count(b"HTTP/1.1 200 ") < len(ids) and (got := connection.recv(4096)):
            answers += got
    assert re.findall(rb"x-request-id: (\S+)", answers.lower()) == [each.encode() for each in ids]


def test_a_client_that_reads_late_gets_everything(front: Front) -> None:
    wanted = 200
    size = len(front.client.get("/openapi.json").content)
    assert wanted * size > 1 << 22  # more than the sockets hold
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", front.port))
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * wanted)
        for _ in range(200):  # meanwhile others are answered
            front.client.get("/health/live").raise_for_status()
        with connection.makefile("rb") as answers:
            for _ in range(wanted):
                while line := answers.readline().strip():
                    assert line.startswith(b"HTTP/1.1 200 ") or b": " in line
                assert len(answers.read(size)) == size


def test_endless_headers_and_garbage_are_refused(front: Front) -> None:
    for sent, status in (
        (b"GET / HTTP/1.1\r\na: " + b"b" * 100_000, 431),
        (b"\x16\x03\x01\r\n", 400),
    ):
        with socket.create_connection(("127.0.0.1", front.port), timeout=10) as connection:
            connection.sendall(sent)
            answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert b'{"status":"error"' in answer


def test_a_client_that_leaves_does_not_cancel(front: Front) -> None:
    front.bell.paused = True
    with socket.create_connection(("127.0.0.1", front.port), timeout=10) as connection:
        connection.sendall(
            b"POST /process HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b'content-length: 20\r\nprefer: wait=1\r\n\r\n{"action":"nothing"}'
        )
        until(lambda: count_tasks() == 1)
    until(lambda: front.waiting.count == 0)
    [task] = front.client.get("/tasks").json()["tasks"]
    assert task["state"] == "queued"


# --- health ---------------------------------------------------------------------------------


def enlist(**changes: Any) -> UUID:
    identity = Identity("test-front@here", agent.name, "here")
    with db.transaction() as connection:
        connection.execute(statements.enlist({**identity.row, "slots": 2}))
        for kind in ("relay", "beat"):
            connection.execute(statements.serve(kind, "one"))
        for name, value in changes.items():
            connection.execute(text(f"UPDATE workers SET {name} = {value}"))
    return identity.worker_id


def health(front: Front) -> dict[str, Any]:
    answer = front.client.get("/health")
    body: dict[str, Any] = answer.json()
    assert answer.status_code == (503 if body["status"] == "unhealthy" else 200)
    return body


def test_health_of_a_working_agent(front: Front) -> None:
    enlist()
    body = health(front)
    assert (body["status"], body["agent"], body["port"], body["reasons"]) == (
        "healthy",
        "test-front",
        8199,
        [],
    )
    assert datetime.fromisoformat(body["timestamp"]).tzinfo
    [found] = body["workers"]
    assert (found["id"], found["host"], found["slots"], found["running"]) == (
        "test-front@here",
        "here",
        2,
        0,
    )
    assert body["queue"] == {"depth": 0, "oldest_age_s": None, "paused": False, "draining": False}
    assert body["checks"]["postgresql"] == body["checks"]["broker"] == "ok"
    assert body["checks"]["redis"] == "ok"
    assert 'agent_health_status{agent_id="test-front"} 1.0' in front.client.get("/metrics").text


def test_health_without_a_live_worker(front: Front) -> None:
    assert "none was ever seen" in health(front)["reasons"][0]
    enlist(heartbeat_at="now() - interval '9 s'")
    body = health(front)
    assert (body["status"], body["workers"]) == ("unhealthy", [])
    assert "last seen 9 s ago" in body["reasons"][0]


def test_health_of_a_worker_that_does_not_consume(front: Front) -> None:
    front.queue()
    enlist(claimed_at="now() - interval '90 s'")
    with db.transaction() as connection:
        connection.execute(text("UPDATE tasks SET run_at = now() - interval '70 s'"))
    body = health(front)
    assert body["status"] == "unhealthy"
    assert body["queue"]["depth"] == 1
    assert body["queue"]["oldest_age_s"] >= 70
    with db.transaction() as connection:
        connection.execute(text("INSERT INTO queues (agent, paused) VALUES ('test-front', true)"))
    body = health(front)
    assert (body["status"], body["queue"]["paused"]) == ("degraded", True)


def test_health_sees_relay_and_beat(front: Front) -> None:
    enlist()
    with db.transaction() as connection:
        connection.execute(text("DELETE FROM services WHERE kind = 'beat'"))
        connection.execute(text("UPDATE services SET heartbeat_at = now() - interval '16 s'"))
    body = health(front)
    assert body["status"] == "degraded"
    assert len(body["reasons"]) == 2


def test_the_sampler_shows_the_latest_sample(front: Front) -> None:
    page = httpx.Client(base_url=front.sampler_url)
    asked = {"Accept": "application/json"}

    def sample() -> httpx.Response:
        return page.get("/metrics", headers=asked)

    until(lambda: sample().status_code == 503)
    assert sample().json()["code"] == "unavailable"
    assert page.get("/health").json()["last_metrics"] is None
    redis.attempt(lambda c: c.hset("system:metrics", "current", payload.dumps({"cpu": 1})))
    until(lambda: sample().status_code == 200)
    assert sample().json() == {"cpu": 1}
    assert page.get("/health").json()["last_metrics"] == {"cpu": 1}
    assert "agent_requests_total" in page.get("/metrics").text
    assert front.client.get("/metrics", headers=asked).text.startswith("# HELP")


# --- faults ---------------------------------------------------------------------------------


def test_lost_database_sessions_cost_no_request(front: Front) -> None:
    for _ in range(3):
        assert front.client.get("/health/ready").status_code == 200
    with db.transaction() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND usename = current_user"
            )
        )
    assert front.queue()


def test_a_locked_table_is_answered_in_time(front: Front) -> None:
    with psycopg.connect(os.environ["SUTAZAI_DATABASE_URL"]) as other:
        other.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()
        answer = front.client.post("/tasks", json={"action": "nothing"})
        assert time.monotonic() - began < 3
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
        assert answer.headers["retry-after"]
        began = time.monotonic()
        assert front.client.get("/health").status_code == 503
        assert time.monotonic() - began < 2
    assert front.queue()
    until(lambda: count_tasks() == 1)


@contextmanager
def frozen(servers: Any, name: str) -> Iterator[None]:
    """Stop a server of this session with SIGSTOP, its children first."""
    if name == "postgresql":
        file = servers.home / "postgresql" / "postmaster.pid"
        pid = int(file.read_text().splitlines()[0])
    else:
        with redis_library.Redis.from_url(servers.redis_url) as client:
            pid = int(client.info("server")["process_id"])
    main = psutil.Process(pid)
    processes = [*main.children(recursive=True), main]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGCONT)


def test_a_frozen_postgresql_is_answered_within_three_seconds(front: Front, servers: Any) -> None:
    assert front.queue()
    with frozen(servers, "postgresql"), ThreadPoolExecutor(12) as pool:

        def ask(path: str) -> tuple[float, int]:
            began = time.monotonic()
            body = {"action": "nothing"}
            answer = front.client.post(path, json=body)
            return time.monotonic() - began, answer.status_code

        asked = list(pool.map(ask, ["/tasks"] * 12))
        began = time.monotonic()
        assert front.client.get("/health").status_code == 503
        assert time.monotonic() - began < 2
    assert [status for _, status in asked] == [503] * 12
    assert max(seconds for seconds, _ in asked) < 3
    until(lambda: front.client.get("/health/ready").status_code == 200)


def test_a_frozen_redis_costs_only_time(front: Front, servers: Any) -> None:
    assert front.client.post("/process", json={"action": "nothing"}).status_code == 200
    with frozen(servers, "valkey"):
        for _ in range(3):
            began = time.monotonic()
            answer = front.client.post("/process", json={"action": "nothing"})
            assert answer.status_code == 200
            assert time.monotonic() - began < 5
    until(lambda: health(front)["checks"]["redis"] == "ok")


# --- the server and the clients -------------------------------------------------------------

SERVE = """
import sys
from sutazai import log
from sutazai.agent import Agent
from sutazai.api.server import serve
log.configure("json", "info")
agents = [Agent(f"served-{port}", port=int(port), doc="x") for port in sys.argv[1:]]
sys.exit(serve(agents, None))
"""


def start_server(*ports: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, *map(str, ports)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def is_served(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health/live").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_stops_in_time_and_answers_those_who_wait(
    database: Any, number: signal.Signals
) -> None:
    ports = free_ports(2)
    server = start_server(*ports)
    try:
        until(lambda: all(map(is_served, ports)), 20)
        with ThreadPoolExecutor(1) as pool:
            url = f"http://127.0.0.1:{ports[0]}/process"
            answer = pool.submit(httpx.post, url, json={"action": "describe"}, timeout=30)
            until(lambda: count_tasks() == 1)
            began = time.monotonic()
            server.send_signal(number)
            assert answer.result().status_code == 202
            assert server.wait(10) == 0
            assert time.monotonic() - began < 4
    finally:
        server.kill()
        _, errors = server.communicate()
    assert "Traceback" not in errors


def test_a_taken_port_is_named(database: Any) -> None:
    [free] = free_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        server = start_server(free, port)
        _, errors = server.communicate(timeout=20)
    assert server.returncode == 1
    [line] = [line for line in errors.splitlines() if not line.startswith("{")]
    assert f"served-{port}" in line
    assert f"127.0.0.1:{port}" in line
    assert not is_served(free)


def test_client(front: Front) -> None:
    with AgentClient(front.url) as client:
        answer = client.send_request("add", first=2, second=3)
        assert (answer["status"], answer["total"]) == ("success", 5)
        assert client.health_check()["agent"] == "test-front"
        task_id = client.submit("add", {"first": 1}, priority=9)
        task = client.wait(task_id, timeout_s=20)
        assert (task["state"], task["priority"]) == ("succeeded", 9)
        with pytest.raises(UnknownAction, match="it has: add"):
            client.send_request("divide")
        with pytest.raises(InvalidInput) as refused:
            client.submit("add", {"first": "x"})
        assert refused.value.details[0]["field"] == "first"
        with pytest.raises(TimeLimitExceeded):
            client.send_request("fail", how="late")
        with pytest.raises(TaskNotFound):
            client.wait(str(uuid4()))
        with pytest.raises(TimeoutError):
            client.wait(front.queue(), timeout_s=0.2)
        told = list(client.events(client.submit("talk", {"lines": 1})))
        assert [event["event"] for event in told][-1] == "result"
        assert {event["event"] for event in told} == {"state", "progress", "log", "result"}
        with pytest.raises(TaskNotFound):
            next(client.events(str(uuid4())))


def test_async_client(front: Front) -> None:
    async def run() -> None:
        async with AsyncAgentClient(front.url) as client:
            assert (await client.send_request("add", first=2))["total"] == 2
            task_id = await client.submit("nothing")
            assert (await client.wait(task_id))["state"] == "succeeded"
            with pytest.raises(TaskFailed):
                await client.send_request("fail", how="plain")
            told = [event async for event in client.events(task_id)]
            assert told[-1]["data"]["state"] == "succeeded"

    asyncio.run(run())


def test_client_goes_on_where_a_stream_of_events_broke_off(front: Front) -> None:
    with AgentClient(front.url) as whole:
        task_id = whole.submit("talk", {"lines": 3})
        whole.wait(task_id)
        expected = list(whole.events(task_id))

    class Breaking(httpx.HTTPTransport):
        """Breaks each stream off after so many bytes."""

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            answer = super().handle_request(request)
            content = b"".join(answer.iter_bytes())
            return httpx.Response(answer.status_code, stream=Broken(content[:400]))

    class Broken(httpx.SyncByteStream):
        def __init__(self, content: bytes) -> None:
            self.content = content

        def __iter__(self) -> Iterator[bytes]:
            yield self.content
            if not self.content.endswith(b"\n\n"):
                raise httpx.ReadError("cut")

    with AgentClient(front.url, transport=Breaking()) as client:
        told: list[dict[str, Any]] = []
        with pytest.raises(Unavailable):  # the result alone is longer than a stream may be
            told.extend(client.events(task_id))
    assert told == expected[: len(told)]
    assert len(told) == len(expected) - 1


def test_client_takes_a_request_id_for_its_idempotency_key(front: Front) -> None:
    with AgentClient(front.url) as client:
        first, again = (client.send_request("nothing", request_id="mine") for _ in range(2))
    assert first["task_id"] == again["task_id"]
    task = front.client.get(f"/tasks/{first['task_id']}").json()
    assert task["idempotency_key"] == "mine"


def test_client_repeats_under_one_idempotency_key() -> None:
    asked: list[str] = []
    keys: set[str | None] = set()

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        body = json.loads(request.content or b"{}")
        keys.add(body.get("options", {}).get("idempotency_key"))
        return httpx.Response(
            503, json={"status": "error", "code": "unavailable", "message": "no", "details": []}
        )

    with AgentClient("http://x", transport=httpx.MockTransport(refuse)) as client:
        with pytest.raises(Unavailable):
            client.submit("nothing")
        assert asked == ["POST"] * 4
        assert len(keys) == 1
        assert None not in keys
        asked.clear()
        with pytest.raises(Unavailable):
            client.health_check()
        assert asked == ["GET"] * 4

    def vanish(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        raise httpx.ConnectError("refused")

    asked.clear()
    with AgentClient("http://x", transport=httpx.MockTransport(vanish)) as client:
        with pytest.raises(Unavailable, match="does not answer"):
            client.submit("nothing")
        assert asked == ["POST"] * 4


@pytest.mark.parametrize(
    "query",
    [
        "action=%00",
        "label=a%3D%00",
        "state=nowhere",
        "limit=0",
        "limit=201",
        "since=yesterday",
        "until=9999-12-31T23:59:59-10:00",
        "parent_id=x",
        "cursor=x",
        "cursor=01a21b07-3ded-78e5-abe0-7f570f2c31aa",
        "cursor=1.------------------------------------",
        "unknown=1",
    ],
)
def test_bad_queries_are_refused(front: Front, query: str) -> None:
    answer = front.client.get(f"/tasks?{query}")
    assert (answer.status_code, answer.json()["status"]) == (422, "error"), answer.text


@pytest.mark.parametrize("name", ["run_at", "deadline_at"])
@pytest.mark.parametrize("instant", ["9999-12-31T23:59:59-10:00", "0001-01-01T00:00:00+10:00"])
def test_instants_that_cannot_be_read_back_are_refused(
    front: Front, name: str, instant: str
) -> None:
    answer = front.client.post("/tasks", json={"action": "nothing", "options": {name: instant}})
    assert answer.status_code == 422, answer.text
