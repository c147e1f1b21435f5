"""Routes that keep promises: keys, batches, retries, queues, events; on real stores and sockets."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import text

from sutazai import db, lifecycle, statements
from sutazai.state import Outcome
from tests.integration.served import Front, agent, until
from tests.integration.test_api_front import count_tasks


@pytest.fixture(autouse=True)
def _unlimited() -> Any:
    yield
    agent.queue_limit = None


def events(stream: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Parse Server-Sent Events."""
    found = []
    for block in stream.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


# --- idempotency keys -----------------------------------------------------------------------


def test_a_hundred_equal_requests_at_once_get_one_answer(front: Front) -> None:
    body = {"action": "add", "first": 40, "second": 2}

    def ask(_: int) -> httpx.Response:
        return front.client.post("/process", json=body, headers={"Idempotency-Key": "k"})

    with ThreadPoolExecutor(25) as pool:
        answers = list(pool.map(ask, range(100)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert Counter(a.headers.get("Idempotent-Replayed") for a in answers) == {"true": 99, None: 1}
    assert count_tasks() == 1


@pytest.mark.parametrize("path", ["/process", "/tasks"])
def test_the_key_may_stand_in_the_body(front: Front, path: str) -> None:
    flat = {"action": "add", "first": 1, "request_id": "k"}
    whole = {"action": "add", "params": {"first": 1}, "options": {"idempotency_key": "k"}}
    body = flat if path == "/process" else whole
    prefer = {"Prefer": "respond-async"}
    first = front.client.post(path, json=body, headers=prefer)
    again = front.client.post(path, json=body, headers=prefer | {"Idempotency-Key": "k"})
    assert first.status_code == again.status_code == 202
    assert first.json()["task_id"] == again.json()["task_id"]
    assert again.headers["Idempotent-Replayed"] == "true"
    task = front.client.get(f"/tasks/{first.json()['task_id']}").json()
    assert task["idempotency_key"] == "k"


def test_a_replay_of_a_failed_task_answers_as_the_first_time(front: Front) -> None:
    body = {"action": "fail", "how": "plain", "request_id": "k"}
    first, again = (front.client.post("/process", json=body) for _ in range(2))
    assert first.status_code == again.status_code == 500
    assert first.json() == again.json()


def test_a_replay_waits_for_the_task_of_the_first_request(front: Front) -> None:
    task_id = front.queue("add", options={"idempotency_key": "k"})
    with ThreadPoolExecutor(1) as pool:
        body = {"action": "add", "first": 1, "request_id": "k"}
        answer = pool.submit(front.client.post, "/process", json=body)
        until(lambda: front.waiting.count == 1)
        front.bell.perform("test-front", "add", UUID(task_id))
        assert answer.result(20).json()["task_id"] == task_id
    assert count_tasks() == 1


def test_a_first_request_that_joins_a_task_is_no_replay(front: Front) -> None:
    joined = front.queue("add", options={"concurrency_key": "c"})
    options = {"concurrency_key": "c", "on_conflict": "join", "idempotency_key": "k"}
    body = {"action": "add", "params": {"first": 1}, "options": options}
    first, again = (front.client.post("/tasks", json=body) for _ in range(2))
    assert first.json()["task_id"] == again.json()["task_id"] == joined
    told = [answer.headers.get("Idempotent-Replayed") for answer in (first, again)]
    assert told == [None, "true"]


def test_another_request_under_the_same_key_is_refused(front: Front) -> None:
    headers = {"Idempotency-Key": "k"}
    front.client.post("/process", json={"action": "add", "first": 1}, headers=headers)
    answer = front.client.post("/process", json={"action": "add", "first": 2}, headers=headers)
    assert answer.status_code == 422
    assert answer.json()["code"] == "idempotency_key_reused"
    assert count_tasks() == 1


def test_a_refused_request_leaves_its_key_free(front: Front) -> None:
    headers = {"Idempotency-Key": "k"}
    refused = front.client.post("/process", json={"action": "add"}, headers=headers)
    assert refused.status_code == 422
    answer = front.client.post("/process", json={"action": "add", "first": 1}, headers=headers)
    assert answer.status_code == 200


# --- queues ---------------------------------------------------------------------------------


def test_a_full_queue_is_429_and_an_old_key_is_not(front: Front) -> None:
    agent.queue_limit = 2
    old = front.queue("add", options={"idempotency_key": "old"})
    front.queue("add")
    front.bell.paused = True
    body = {"action": "add", "params": {"first": 1}}
    for path, sent in (
        ("/tasks", body),
        ("/tasks/batch", [body]),
        ("/process", {"action": "nothing"}),
    ):
        answer = front.client.post(path, json=sent, headers={"Prefer": "respond-async"})
        assert answer.status_code == 429, path
        assert answer.json()["code"] == "queue_full"
        assert int(answer.headers["Retry-After"]) >= 1
    again = front.client.post("/tasks", json=body | {"options": {"idempotency_key": "old"}})
    assert (again.status_code, again.json()["task_id"]) == (202, old)
    assert count_tasks() == 2
    assert front.client.get("/queue").json()["limit"] == 2


def test_pausing_and_resuming_a_queue(front: Front) -> None:
    paused = front.client.post("/queue/pause").json()
    assert (paused["paused"], paused["draining"]) == (True, False)
    answer = front.client.post(
        "/process", json={"action": "add", "first": 1}, headers={"Prefer": "wait=1"}
    )
    assert (answer.status_code, answer.json()["state"]) == (202, "queued")
    assert front.client.get("/health").json()["queue"]["paused"] is True
    resumed = front.client.post("/queue/resume").json()
    assert (resumed["paused"], resumed["depth"]) == (False, 1)
    rung = db.run(statements.ring_unrung("test-front", 9))
    assert len(rung) == 1, "in its turn: what came while the queue was paused did nothing"


def test_a_draining_queue_is_409(front: Front) -> None:
    assert front.client.post("/queue/drain").json()["draining"] is True
    for headers in ({}, {"Idempotency-Key": "k"}):
        answer = front.client.post("/process", json={"action": "add", "first": 1}, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (409, "queue_draining")
    reasons = " ".join(front.client.get("/health").json()["reasons"])
    assert "drains" in reasons
    front.client.post("/queue/resume")
    answer = front.client.post("/process", json={"action": "add", "first": 1})
    assert answer.status_code == 200


# --- concurrency keys -----------------------------------------------------------------------


def test_conflicts_over_a_concurrency_key(front: Front) -> None:
    first = front.queue("add", options={"concurrency_key": "a"})

    def ask(how: str) -> httpx.Response:
        front.bell.paused = True
        options = {"concurrency_key": "a", "on_conflict": how}
        body = {"action": "add", "params": {"first": 1}, "options": options}
        return front.client.post("/tasks", json=body)

    rejected = ask("reject")
    assert (rejected.status_code, rejected.json()["code"]) == (409, "concurrency_key_busy")
    assert rejected.json()["details"] == [first]
    assert ask("join").json()["task_id"] == first
    assert ask("enqueue").json()["task_id"] != first
    replaced = ask("replace").json()["task_id"]
    states = {task["task_id"]: task["state"] for task in front.client.get("/tasks").json()["tasks"]}
    assert states.pop(replaced) == "queued"
    assert set(states.values()) == {"cancelled"}


# --- batches --------------------------------------------------------------------------------


def test_a_batch_is_accepted_in_order(front: Front) -> None:
    body = [{"action": "add", "params": {"first": index}} for index in range(500)]
    answer = front.client.post("/tasks/batch", json=body)
    assert answer.status_code == 202
    ids = answer.json()["task_ids"]
    assert len(set(ids)) == 500
    for index in (0, 250, 499):
        assert front.client.get(f"/tasks/{ids[index]}").json()["params"] == {"first": index}


def test_a_faulty_item_refuses_the_whole_batch(front: Front) -> None:
    body = [{"action": "add", "params": {"first": 1}}, {"action": "add", "params": {}}]
    answer = front.client.post("/tasks/batch", json=body)
    assert answer.status_code == 422
    assert answer.json()["message"].startswith("Item 1: ")
    body = [{"action": "add", "params": {"first": 1}}, {"action": "nothing", "params": {}}]
    body[1]["params"] = {"x": "a" * (1 << 20)}
    assert front.client.post("/tasks/batch", json=body).status_code == 413
    assert count_tasks() == 0


def test_a_batch_of_ten_thousand_does_not_stop_the_front(front: Front) -> None:
    body = json.dumps([{"action": "add", "params": {"first": index}} for index in range(10_000)])
    done = threading.Event()
    slowest_s = 0.0

    def send() -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        answer = front.client.post("/tasks/batch", content=body, headers=headers)
        done.set()
        return answer

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send)
        while not done.is_set():
            slowest_s = max(slowest_s, front.client.get("/health/live").elapsed.total_seconds())
        assert sent.result(30).status_code == 202
    assert slowest_s < 2
    assert count_tasks() == 10_000
    body = json.dumps([{"action": "nothing"}] * 10_001)
    headers = {"Content-Type": "application/json"}
    assert front.client.post("/tasks/batch", content=body, headers=headers).status_code == 422


# --- retries --------------------------------------------------------------------------------


def test_a_retry_is_a_new_task(front: Front) -> None:
    failed = front.client.post("/process", json={"action": "fail", "how": "plain"}).json()[
        "task_id"
    ]
    again = front.client.post(f"/tasks/{failed}/retry")
    assert again.status_code == 202
    task = front.client.get(f"/tasks/{again.json()['task_id']}", params={"wait": 10}).json()
    assert (task["retry_of"], task["params"], task["state"]) == (failed, {"how": "plain"}, "failed")
    edited = front.client.post(f"/tasks/{failed}/retry", json={"params": {"how": "late"}})
    task = front.client.get(f"/tasks/{edited.json()['task_id']}", params={"wait": 10}).json()
    assert task["error"]["code"] == "time_limit_exceeded"
    refused = front.client.post(f"/tasks/{failed}/retry", json={"params": {"who": "x"}})
    assert refused.status_code == 422


def test_a_task_that_has_not_ended_is_not_retried(front: Front) -> None:
    answer = front.client.post(f"/tasks/{front.queue()}/retry")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert front.client.post(f"/tasks/{uuid4()}/retry").status_code == 404


def test_failed_tasks_are_replayed_in_bulk(front: Front) -> None:
    for how in ("plain", "late"):
        front.client.post("/process", json={"action": "fail", "how": how})
    body = {"code": "time_limit_exceeded", "params": {"how": "plain"}, "rate_per_s": 100}
    answer = front.client.post("/tasks/retry", json=body)
    assert answer.status_code == 202
    [made] = answer.json()["task_ids"]
    assert front.client.get(f"/tasks/{made}").json()["params"] == {"how": "plain"}
    assert front.client.post("/tasks/retry", json=body).json()["task_ids"] == []
    assert len(front.client.post("/tasks/retry").json()["task_ids"]) == 1
    assert front.client.post("/tasks/retry", json={"colour": "red"}).status_code == 422
    assert front.client.post("/tasks/retry", json={"agent": "nobody"}).status_code == 404


@pytest.fixture
def _labelled(front: Front) -> Iterator[None]:
    """Label new tasks with the limit under which they were inserted."""
    with db.transaction() as connection:
        for statement in _LABEL:
            connection.execute(text(statement))
    yield
    with db.transaction() as connection:
        connection.execute(text("DROP FUNCTION label_limit CASCADE"))


_LABEL = (
    """CREATE FUNCTION label_limit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        NEW.labels = jsonb_build_object('limit', current_setting('statement_timeout'));
        RETURN NEW; END $$""",
    "CREATE TRIGGER label_limit BEFORE INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION label_limit()",
)


@pytest.mark.usefixtures("_labelled")
def test_what_may_take_long_is_not_cut_off_as_what_is_answered_at_once(front: Front) -> None:
    def limit(task_id: str) -> Any:
        return front.client.get(f"/tasks/{task_id}").json()["labels"]["limit"]

    failed = front.client.post("/process", json={"action": "fail", "how": "plain"}).json()
    [made] = front.client.post("/tasks/retry").json()["task_ids"]
    body = {"action": "add", "params": {"first": 1}, "options": {"idempotency_key": "k"}}
    [batched] = front.client.post("/tasks/batch", json=[body]).json()["task_ids"]
    assert (limit(failed["task_id"]), limit(made), limit(batched)) == ("2500ms", "30s", "30s")
    body["options"] = {"idempotency_key": "l"}
    for _ in range(8):  # whichever pooled connection it was
        later = front.client.post("/tasks", json=body).json()["task_id"]
    assert limit(later) == "2500ms"


# --- events ---------------------------------------------------------------------------------


def test_events_tell_the_whole_story_in_order(front: Front) -> None:
    task_id = front.client.post("/process", json={"action": "talk"}).json()["task_id"]
    stream = front.client.get(f"/tasks/{task_id}/events")
    assert stream.headers["content-type"].startswith("text/event-stream")
    told = events(stream.text)
    ids = [event_id for event_id, _, _ in told]
    assert ids == sorted(set(ids))
    kinds = [kind for _, kind, _ in told]
    assert Counter(kinds) == {"state": 3, "progress": 2, "log": 3, "result": 1}
    assert [data["state"] for _, kind, data in told if kind == "state"] == [
        "queued",
        "running",
        "succeeded",
    ]
    assert [data["event"] for _, kind, data in told if kind == "log"] == ["begun", "line", "line"]
    assert told[-1][1] == "result"
    assert told[-1][2]["result"] == {"total": 2}


def test_an_end_at_an_even_microsecond_is_told_once(front: Front) -> None:
    task_id = front.client.post("/process", json={"action": "nothing"}).json()["task_id"]
    with db.transaction() as connection:
        # PostgreSQL writes 12:00:00.12345 within JSON, where Python writes 12:00:00.123450.
        for change in ("tasks SET finished_at", "attempts SET ended_at"):
            connection.execute(
                text(f"UPDATE {change} = date_trunc('day', now()) + '12:00:00.12345'")
            )
    told = events(front.client.get(f"/tasks/{task_id}/events").text)
    assert [kind for _, kind, _ in told] == ["state", "state", "state", "result"]
    [attempt] = told[-1][2]["attempts"]
    assert attempt["ended_at"] == told[-1][2]["finished_at"]
    assert attempt["ended_at"].endswith("12:00:00.123450Z")


@pytest.mark.parametrize("set_back_s", [0, 3600])
def test_events_resume_where_they_were_broken_off(front: Front, set_back_s: int) -> None:
    task_id = front.client.post("/process", json={"action": "talk"}).json()["task_id"]
    with db.transaction() as connection:
        # As if the database's clock had been set back before the end.
        connection.execute(
            text("UPDATE task_events SET event_id = event_id + :more"),
            {"more": set_back_s * 1_000_000_000},
        )
    path = f"/tasks/{task_id}/events"
    told = events(front.client.get(path).text)
    assert [kind for _, kind, _ in told[-2:]] == ["state", "result"]
    assert len(told) == 9, "nothing is missing: see the whole story"
    resumes_everywhere(front, path, told)
    for bad in ("x", "-1", str(1 << 64)):
        assert front.client.get(path, headers={"Last-Event-ID": bad}).status_code == 422
    assert front.client.get(f"/tasks/{uuid4()}/events").status_code == 404


def resumes_everywhere(front: Front, path: str, told: list[tuple[int, str, Any]]) -> None:
    ids = [event_id for event_id, _, _ in told]
    assert ids == sorted(set(ids))
    for index, event_id in enumerate(ids[:-1]):
        rest = front.client.get(path, headers={"Last-Event-ID": str(event_id)})
        assert events(rest.text) == told[index + 1 :]
    for over in (ids[-1], (1 << 63) - 1):
        answer = front.client.get(path, headers={"Last-Event-ID": str(over)})
        assert (answer.status_code, answer.text) == (204, "")


def test_an_end_that_began_before_other_events_is_told_after_them(front: Front) -> None:
    task_id = front.queue("nothing")
    path = f"/tasks/{task_id}/events"
    seen: list[str] = []
    with ExitStack() as cancelling, front.client.stream("GET", path) as stream:
        connection = cancelling.enter_context(db.transaction())
        connection.execute(text("SELECT now()"))  # which it will have ended at
        put_back(UUID(task_id))
        for line in stream.iter_lines():
            assert line[:1] != ":", "nothing came for so long that a comment was sent"
            seen.append(line)
            if not line and seen.count("event: state") == 3:  # queued, running, queued
                lifecycle.cancel(connection, UUID(task_id))
                cancelling.close()
    told = events("\n".join(seen))
    states = [data["state"] for _, _, data in told]
    assert states == ["queued", "running", "queued", "cancelled", "cancelled"]
    assert told[-1][1] == "result"
    assert events(front.client.get(path).text) == told
    resumes_everywhere(front, path, told)


def put_back(task_id: UUID) -> None:
    held = lifecycle.Claim(task_id, uuid4(), agent.name, None, None)
    names = {"agent": agent.name, "action": "nothing", "worker": "x@here", "host": "here"}
    claim = statements.claim(task_id, claim_id=held.claim_id, worker_id=uuid4(), **names)
    with db.transaction() as connection:
        connection.execute(*claim).one()
    with db.transaction() as connection:
        assert lifecycle.requeue(connection, held, Outcome.RELEASED) == []


def test_a_line_that_comes_after_the_end_changes_nothing(front: Front) -> None:
    task_id = front.client.post("/process", json={"action": "nothing"}).json()["task_id"]
    path = f"/tasks/{task_id}/events"
    *_, state, result = events(front.client.get(path).text)
    with db.transaction() as connection:
        # Lines are told without the lock of the task's row, so they may come after its end.
        connection.execute(
            text("INSERT INTO task_events VALUES (:task_id, :event_id, 'log', '{}')"),
            {"task_id": task_id, "event_id": result[0] + 5000},
        )
    rest = front.client.get(path, headers={"Last-Event-ID": str(state[0])})
    assert events(rest.text) == [result]
    over = front.client.get(path, headers={"Last-Event-ID": str(result[0])})
    assert (over.status_code, over.text) == (204, "")


def test_events_come_while_the_task_goes_on(front: Front) -> None:
    task_id = front.queue("talk", params={"lines": 0})
    seen = []
    with front.client.stream("GET", f"/tasks/{task_id}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                seen.append(line.removeprefix("event: "))
                if len(seen) == 1:
                    front.bell.perform("test-front", "talk", UUID(task_id))
    assert (seen[0], seen[-1]) == ("state", "result")


def test_log_lines_of_one_task_are_bounded(front: Front) -> None:
    answer = front.client.post("/process", json={"action": "talk", "lines": 1200})
    assert answer.status_code == 200
    told = events(front.client.get(f"/tasks/{answer.json()['task_id']}/events").text)
    assert Counter(kind for _, kind, _ in told)["log"] == 1000
    assert told[-1][1] == "result"
