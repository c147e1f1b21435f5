"""Requests of any shape, which OpenAPI cannot describe: each has one of the documented answers."""

from __future__ import annotations

import json
import string
from typing import Any
from urllib.parse import quote

import httpx
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.integration.served import Front

STATUSES = {200, 201, 202, 204, 400, 404, 405, 409, 413, 415, 422, 429, 503, 504, 500}
"""500 and 504 are how a task ended, and have its id."""

TOKEN = st.text(string.ascii_letters + string.digits + "-_.*=,;:/ ", max_size=30)

VISIBLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40)

HEADERS = st.dictionaries(
    st.sampled_from(
        [
            *("Prefer", "Idempotency-Key", "X-Request-ID", "Last-Event-ID", "Content-Type"),
            *("Accept", "Accept-Encoding", "Content-Encoding", "If-None-Match", "Range", "Expect"),
        ]
    ),
    VISIBLE
    | TOKEN
    | st.sampled_from(
        [
            *("wait=0", "wait=-1", "wait=1e9", "respond-async; wait=0", "wait", "wait=٣"),
            *("application/json", "application/json; charset=utf-16", "text/plain", "*/*;q=x"),
        ]
    ),
    max_size=3,
)

QUERY = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("priority", "deadline_s", "max_attempts", "wait", "state", "action", "label"),
                *("since", "until", "limit", "cursor", "agent", "parent_id", "x", ""),
            ]
        ),
        st.text(max_size=12)
        | st.sampled_from(["0", "-1", "1e999", "nan", "9" * 30, "k=v", "=", "*", "\0", "\ud800"]),
    ),
    max_size=4,
)

PATH = st.sampled_from(
    [
        *("/process", "/tasks", "/tasks/batch", "/tasks/retry", "/queue", "/queue/pause"),
        *("/schedules", "/actions", "/health", "/metrics", "/openapi.json", "/docs", "/"),
    ]
) | st.builds(
    lambda start, name, end: f"{start}{quote(name, safe='', errors='surrogatepass')}{end}",
    st.sampled_from(["/tasks/", "/schedules/", "/queue/", "/"]),
    st.text(max_size=20),
    st.sampled_from(["", "/events", "/cancel", "/retry", "/run", "/"]),
)

LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=8)
)
JSON = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["action", "params", "options", "first", "labels", "name", "every_s", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
ACTION = st.builds(
    lambda more: {"action": "add", **more},
    st.dictionaries(st.sampled_from(["first", "second", "request_id", "params", "options"]), JSON),
)

BODY = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    ACTION.map(lambda value: json.dumps(value).encode()),
    ACTION.map(lambda value: b"\xef\xbb\xbf" + json.dumps(value).encode()),
    ACTION.map(lambda value: json.dumps(value).encode()[:-1]),
    st.lists(ACTION, max_size=3).map(lambda value: json.dumps(value).encode()),
)

METHOD = st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "BREW"])


def check(answer: httpx.Response) -> None:
    assert answer.status_code in STATUSES, answer.text
    assert answer.headers["X-Request-ID"]
    if answer.status_code < 400 or answer.request.method == "HEAD":
        return
    assert answer.headers["Content-Type"].startswith("application/json"), answer.text
    body: dict[str, Any] = answer.json()
    if answer.request.url.path == "/health":
        return
    assert body["status"] == "error"
    assert body["code"] == body["code"].lower()
    assert body["message"]
    assert "Traceback" not in answer.text
    if answer.status_code in (500, 504):
        assert body["task_id"], answer.text
    if answer.status_code == 503:
        assert "Retry-After" in answer.headers


def test_any_request_has_a_documented_answer(front: Front) -> None:
    @given(METHOD, PATH, QUERY, HEADERS, BODY)
    @example("POST", "/process", [], {}, b'{"action": "add", "first": ' + b"9" * 5000 + b"}")
    @example("POST", "/process", [], {}, b"[" * 100_000 + b"]" * 100_000)
    @example("POST", "/process", [], {"Content-Encoding": "gzip"}, b'{"action": "add"}')
    @example("GET", "/tasks/%00/events", [], {"Last-Event-ID": "9" * 30}, b"")
    @settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
    def send(
        method: str, path: str, query: list[tuple[str, str]], headers: dict[str, str], body: bytes
    ) -> None:
        text = "&".join(
            f"{quote(name)}={quote(value, safe='', errors='surrogatepass')}"
            for name, value in query
        )
        url = httpx.URL(front.url).copy_with(raw_path=f"{path}?{text}".encode())
        # A wait is not waited out, and a stream is not followed to its end.
        known = {name: value.strip().encode() for name, value in headers.items()}
        known = {"Prefer": b"wait=0", "Content-Type": b"application/json", **known}
        with front.client.stream(method, url, headers=known, content=body) as answer:
            if answer.headers.get("Content-Type", "").startswith("text/event-stream"):
                assert answer.status_code == 200
                return
            answer.read()
            check(answer)

    send()
    assert front.client.get("/health/live").status_code == 200
