"""The application without services: refusals, ids, metrics, documentation."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from datetime import timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import httpx
import pytest
import structlog
from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sutazai import db
from sutazai.agent import Agent, Context
from sutazai.api.app import ROUTES, create_app
from sutazai.api.waiting import Waiting
from sutazai.errors import UnknownAction
from sutazai.settings import override

agent = Agent("mathematician", port=8101, doc="Does sums.")


class Rounding(StrEnum):
    UP = "up"
    DOWN = "down"


class AddParams(BaseModel):
    first: int
    second: int = Field(default=0, description="The other one.")
    rounding: Rounding = Rounding.UP


class Sum(BaseModel):
    total: int


@agent.action(time_limit_s=5, max_attempts=2, every=None)
def add(params: AddParams, context: Context) -> Sum:
    """Add two numbers."""
    return Sum(total=params.first + params.second)


class Options(BaseModel):
    rounding: Rounding = Rounding.DOWN


@agent.action(every=timedelta(seconds=30))
def tick(params: Options, context: Context) -> Sum:
    """Do it by the clock."""
    return Sum(total=0)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[FastAPI]:
    # Nothing listens there, so whatever needs a store is refused at once; the engine that is made
    # for it must not be met by other tests.
    monkeypatch.setattr(db, "_async_engines", {})
    override(
        database_url="postgresql://nobody@127.0.0.1:1/none", broker_url="redis://127.0.0.1:1/0"
    )
    app = create_app(agent, agents={agent.name: agent}, bell=None, waiting=Waiting())
    yield app
    override(database_url=None, broker_url=None)


def ask(app: FastAPI, method: str, path: str, **arguments: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(run())


def check_error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check the one shape of errors, and that nothing of the inside shows."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body: dict[str, Any] = answer.json()
    assert list(body) == ["status", "code", "message", "details", "task_id"]
    assert body["status"] == "error"
    assert body["code"] == code
    assert body["message"].endswith((".", ")", "]")) or ":" in body["message"]
    assert body["task_id"] is None
    assert isinstance(body["details"], list)
    assert not re.search(r"Traceback|File \"|<html", answer.text)
    return body


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("path", ["/process", "/tasks"])
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed_json"),
        (b" \n", 400, "malformed_json"),
        (b'{"action"', 400, "malformed_json"),
        (b'\xef\xbb\xbf{"action":"add"}', 400, "malformed_json"),
        (b'{"action":"add","first":NaN}', 400, "malformed_json"),
        (b'{"action":"add","first":Infinity}', 400, "malformed_json"),
        (b'{"action":"add","first":1e999}', 400, "malformed_json"),
        (b'{"action":"add","first":"\\ud800"}', 400, "malformed_json"),
        (b'{"action":"add","first":"\xff"}', 400, "malformed_json"),
        (b'{"action":"add","first":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None),
        (b'{"action":"add","first":' + b"[" * 101 + b"]" * 101 + b"}", 400, None),
        (b"[]", 422, "invalid_input"),
        (b"null", 422, "invalid_input"),
        (b'"add"', 422, "invalid_input"),
        (b'{"action":"add","first":"a\\u0000"}', 422, "invalid_input"),
        (b'{"action":"add","first":99999999999999999999}', 422, "invalid_input"),
        (b'{"action":"add","first":' + b"9" * 300 + b"}", 422, "invalid_input"),
        (b"{}", 422, "invalid_input"),
        (b'{"action":7}', 422, "invalid_input"),
        (b'{"action":"subtract"}', 422, "unknown_action"),
        (b'{"action":"add","action":"subtract"}', 422, "unknown_action"),
        (b'{"action":"add","second":1}', 422, "invalid_input"),
    ],
)
def test_bad_bodies(app: FastAPI, path: str, body: bytes, status: int, code: str | None) -> None:
    answer = ask(app, "POST", path, content=body, headers=JSON)
    check_error(answer, status, code or "malformed_json")


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"action": "add", "first": "1"}, ["first"]),
        ({"action": "add", "first": 1.5}, ["first"]),
        ({"action": "add", "first": True}, ["first"]),
        ({"action": "add", "first": 1, "third": 3}, ["third"]),
        ({"action": "add", "first": 1, "rounding": "sideways"}, ["rounding"]),
        ({"action": "add", "third": 3}, ["first", "third"]),
        ({"action": "add", "first": 1, "request_id": "a b"}, ["idempotency_key"]),
        ({"action": "add", "first": 1, "request_id": 7}, ["idempotency_key"]),
        ({"first": 1}, ["action"]),
    ],
)
def test_fields_at_fault_are_named(app: FastAPI, body: dict[str, Any], fields: list[str]) -> None:
    error = check_error(ask(app, "POST", "/process", json=body), 422, "invalid_input")
    assert [detail["field"] for detail in error["details"]] == fields
    assert all(detail["message"] for detail in error["details"])


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"params": {}}, ["action"]),
        ({"action": "add", "params": []}, ["params"]),
        ({"action": "add", "options": 1}, ["options"]),
        ({"action": "add", "first": 1}, ["first"]),
        (
            {"action": "add", "params": {"first": 1}, "options": {"priority": 10}},
            ["options.priority"],
        ),
        (
            {"action": "add", "params": {"first": 1}, "options": {"priority": "5"}},
            ["options.priority"],
        ),
        (
            {"action": "add", "params": {"first": 1}, "options": {"run_at": "2030-01-01T00:00:00"}},
            ["options.run_at"],
        ),
        (
            {"action": "add", "params": {"first": 1}, "options": {"callback_url": "x://y"}},
            ["options.callback_url"],
        ),
        (
            {"action": "add", "params": {"first": 1}, "options": {"labels": {"a": 1}}},
            ["options.labels.a"],
        ),
    ],
)
def test_tasks_body_is_strict(app: FastAPI, body: dict[str, Any], fields: list[str]) -> None:
    error = check_error(ask(app, "POST", "/tasks", json=body), 422, "invalid_input")
    assert [detail["field"] for detail in error["details"]] == fields


def test_unknown_action_lists_the_known_ones(app: FastAPI) -> None:
    error = check_error(
        ask(app, "POST", "/process", json={"action": "divide"}), 422, "unknown_action"
    )
    assert "add, describe, tick" in error["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {},
    ],
)
def test_what_is_not_declared_as_json_is_refused(app: FastAPI, headers: dict[str, str]) -> None:
    answer = ask(app, "POST", "/process", content=b'{"action":"add"}', headers=headers)
    check_error(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "kind", ["application/json;charset=UTF-8", "application/vnd.x+json", "Application/JSON"]
)
def test_json_by_other_names_is_taken(app: FastAPI, kind: str) -> None:
    answer = ask(app, "POST", "/process", content=b"{}", headers={"Content-Type": kind})
    check_error(answer, 422, "invalid_input")


def test_empty_body_without_a_type_is_told_so(app: FastAPI) -> None:
    check_error(ask(app, "POST", "/process"), 400, "malformed_json")


def test_a_body_of_two_mebibytes_is_refused_with_and_without_length(app: FastAPI) -> None:
    check_error(
        ask(app, "POST", "/process", content=b" " * (2 << 20), headers=JSON),
        413,
        "payload_too_large",
    )
    sent = 0

    async def chunks() -> Any:
        nonlocal sent
        while sent < 2 << 20:
            sent += 65_536
            yield b" " * 65_536

    answer = ask(app, "POST", "/process", content=chunks(), headers=JSON)
    check_error(answer, 413, "payload_too_large")
    body = b'{"action": "subtract", "x": "' + b"a" * ((1 << 20) - 32) + b'"}'
    assert (1 << 20) - 8 < len(body) <= 1 << 20
    answer = ask(app, "POST", "/process", content=body, headers=JSON)
    check_error(answer, 422, "unknown_action")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/process", {"action": "tick", "request_id": "b"}),
        ("/tasks", {"action": "tick", "options": {"idempotency_key": "b"}}),
    ],
)
def test_two_different_idempotency_keys_are_refused(
    app: FastAPI, path: str, body: dict[str, Any]
) -> None:
    answer = ask(app, "POST", path, json=body, headers={"Idempotency-Key": "a"})
    error = check_error(answer, 422, "invalid_input")
    assert "differ" in error["message"]


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
def test_an_idempotency_key_is_visible_ascii(app: FastAPI, key: str) -> None:
    answer = ask(app, "POST", "/process", json={"action": "tick"}, headers={"Idempotency-Key": key})
    check_error(answer, 422, "invalid_input")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/x",
        "http://127.0.0.1/x",
        "http://localhost/x",
        "http://[::1]:9/x",
        "http://[::ffff:10.0.0.1]/x",
        "http://169.254.169.254/latest/meta-data",
        "http://user:word@example.org/",
        "http://example.org:99999/",
    ],
)
def test_a_callback_to_somewhere_private_is_refused(app: FastAPI, url: str) -> None:
    override(callback_secret="s3cret")
    answer = ask(app, "POST", "/tasks", json={"action": "tick", "options": {"callback_url": url}})
    override(callback_secret=None)
    error = check_error(answer, 422, "invalid_input")
    assert error["details"][0]["field"] == "options.callback_url"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{}", "invalid_input"),
        (b"[]", "invalid_input"),
        (b"[1]", "invalid_input"),
        (b'[{"action": "tick"}, {"action": "tock"}]', "unknown_action"),
        (b'[{"action": "tick", "options": {"priority": 11}}]', "invalid_input"),
    ],
)
def test_a_faulty_batch_is_refused_as_a_whole(app: FastAPI, body: bytes, code: str) -> None:
    check_error(ask(app, "POST", "/tasks/batch", content=body, headers=JSON), 422, code)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/process?priority=10", ["priority"]),
        ("/process?deadline_s=nan&max_attempts=0", ["deadline_s", "max_attempts"]),
        ("/process?colour=red", ["colour"]),
    ],
)
def test_bad_query_of_process(app: FastAPI, path: str, fields: list[str]) -> None:
    error = check_error(ask(app, "POST", path, json={"action": "tick"}), 422, "invalid_input")
    assert [detail["field"] for detail in error["details"]] == fields


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("cursor=x", "cursor"),
        ("state=done", "state.0"),
        ("state=queued&state=done", "state.1"),
        ("label=k", "label.0"),
        ("since=yesterday", "since"),
        ("until=2030-01-01T00:00:00", "until"),
        ("parent_id=1", "parent_id"),
        ("agent=nobody", "agent"),
        ("page=2", "page"),
    ],
)
def test_bad_query_of_the_list_names_the_field(app: FastAPI, query: str, field: str) -> None:
    error = check_error(ask(app, "GET", f"/tasks?{query}"), 422, "invalid_input")
    assert [detail["field"] for detail in error["details"]] == [field]


def test_unknown_addresses_methods_and_ids(app: FastAPI) -> None:
    check_error(ask(app, "GET", "/nothing"), 404, "not_found")
    check_error(ask(app, "GET", "/tasks/"), 404, "not_found")
    answer = ask(app, "GET", "/process")
    check_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    for task_id in ("1", "x" * 36, "{01a20541-ecd2-787a-a6a3-21efa0fedd63}"):
        check_error(ask(app, "GET", f"/tasks/{task_id}"), 404, "task_not_found")


def test_without_postgresql_nothing_is_accepted(app: FastAPI) -> None:
    for method, path, body in (
        ("POST", "/process", {"action": "tick"}),
        ("POST", "/tasks", {"action": "tick"}),
        ("GET", "/tasks", None),
        ("GET", "/health/ready", None),
    ):
        answer = ask(app, method, path, json=body)
        check_error(answer, 503, "database_unavailable")
        assert int(answer.headers["retry-after"]) >= 1


def test_health_without_any_service(app: FastAPI) -> None:
    answer = ask(app, "GET", "/health")
    assert answer.status_code == 503
    body = answer.json()
    assert body["status"] == "unhealthy"
    assert (body["agent"], body["port"]) == ("mathematician", 8101)
    assert body["checks"]["postgresql"] == body["checks"]["broker"] == "does not answer"
    assert body["reasons"][0].startswith("PostgreSQL")
    assert "last_metrics" not in body
    assert ask(app, "GET", "/health/live").status_code == 200


def test_request_id_is_the_callers_or_ours(app: FastAPI) -> None:
    given = ask(app, "GET", "/health/live", headers={"X-Request-ID": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 201, ""):
        answer = ask(app, "GET", "/health/live", headers={"X-Request-ID": bad})
        UUID(answer.headers["x-request-id"])
    assert ask(app, "GET", "/nothing", headers={"X-Request-ID": "n"}).headers["x-request-id"] == "n"


def test_an_error_of_our_own_is_logged_and_not_shown(app: FastAPI) -> None:
    async def broken(_: Request) -> Response:
        raise RuntimeError("the secret")

    app.router.routes.append(Route("/broken", broken))
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        answer = ask(app, "GET", "/broken", headers={"X-Request-ID": "r-1"})
    check_error(answer, 500, "internal_error")
    assert "secret" not in answer.text
    failed, request = lines
    assert (failed["event"], failed["exc_info"]) == ("a request failed", True)
    assert (request["status"], request["log_level"]) == (500, "error")
    assert failed["request_id"] == request["request_id"] == "r-1"


def test_metrics_have_bounded_labels(app: FastAPI) -> None:
    for path in ("/health/live", "/nothing/1", "/nothing/2", "/tasks/1", "/tasks/2"):
        ask(app, "GET", path)
    answer = ask(app, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.text
    who = 'agent_id="mathematician"'
    assert f'agent_requests_total{{{who},endpoint="unmatched"}} 2.0' in text
    assert f'agent_requests_total{{{who},endpoint="/tasks/{{task_id}}"}} 2.0' in text
    assert f'agent_request_duration_seconds_count{{{who},endpoint="/health/live"}} 1.0' in text
    assert f"agent_health_status{{{who}}} 0.0" in text
    assert (
        'sutazai_http_requests_total{agent="mathematician",code="404",route="unmatched"} 2.0'
        in text
    )
    answer = ask(app, "GET", "/metrics", headers={"Accept": "application/openmetrics-text"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_two_fronts_count_apart(app: FastAPI) -> None:
    other = create_app(agent, agents={}, bell=None, waiting=Waiting())
    ask(app, "GET", "/health/live")
    assert "/health/live" not in ask(other, "GET", "/metrics").text


def test_actions_tell_schemas_and_limits(app: FastAPI) -> None:
    listed = ask(app, "GET", "/actions").json()
    assert listed["agent"] == "mathematician"
    by_name = {action["name"]: action for action in listed["actions"]}
    assert set(by_name) == {"describe", "add", "tick"}
    assert by_name["add"]["description"] == "Add two numbers."
    assert by_name["add"]["params_schema"]["required"] == ["first"]
    assert by_name["add"]["params_schema"]["additionalProperties"] is False
    assert by_name["add"]["result_schema"]["properties"]["total"]["type"] == "integer"
    assert (by_name["add"]["time_limit_s"], by_name["add"]["max_attempts"]) == (5.0, 2)
    assert (by_name["add"]["every_s"], by_name["tick"]["every_s"]) == (None, 30.0)


def test_default_action_must_exist() -> None:
    lost = Agent("lost", port=8102, doc="Has none.", default_action="nowhere")
    with pytest.raises(UnknownAction):
        create_app(lost, agents={}, bell=None, waiting=Waiting())


def test_default_action_is_what_a_body_without_one_means() -> None:
    asked = Agent("asked", port=8103, doc="Has one.", default_action="describe")
    app = create_app(asked, agents={}, bell=None, waiting=Waiting())
    error = check_error(ask(app, "POST", "/process", json={"x": 1}), 422, "invalid_input")
    assert error["details"][0]["field"] == "x"
    document = app.openapi()
    assert "required" not in document["components"]["schemas"]["DescribeRequest"] or (
        document["components"]["schemas"]["DescribeRequest"]["required"] == []
    )


# --- documentation --------------------------------------------------------------------------


def test_openapi_documents_each_action_by_discriminator(app: FastAPI) -> None:
    document = ask(app, "GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    body = document["paths"]["/process"]["post"]["requestBody"]["content"]["application/json"]
    schema = body["schema"]
    assert schema["discriminator"]["propertyName"] == "action"
    assert set(schema["discriminator"]["mapping"]) == {"describe", "add", "tick"}
    assert len(schema["oneOf"]) == 3
    request = schemas["AddRequest"]
    assert request["properties"]["action"] == {"const": "add"}
    assert request["required"] == ["action", "first"]
    assert request["additionalProperties"] is False
    # Two models of two actions may have one name.
    assert schemas["AddRequest.Rounding"]["enum"] == schemas["TickRequest.Rounding"]["enum"]
    assert document["paths"]["/process"]["post"]["responses"]["422"]


def test_every_reference_of_openapi_leads_somewhere(app: FastAPI) -> None:
    document = app.openapi()
    text = json.dumps(document)
    assert "$defs" not in text
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in document["components"]["schemas"]


def test_every_route_is_documented(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    for method, path, _ in ROUTES:
        if not path.startswith(("/docs", "/openapi")):
            assert method.lower() in paths[path], path
    names = [operation["operationId"] for path in paths.values() for operation in path.values()]
    assert len(names) == len(set(names))


def test_openapi_is_valid(app: FastAPI) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(app.openapi())


def test_docs_refer_to_nothing_elsewhere(app: FastAPI) -> None:
    page = ask(app, "GET", "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "//" not in page.text.replace("<!doctype html>", "")
    references = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(references) == 4
    for reference in references:
        file = ask(app, "GET", f"/{reference}")
        assert file.status_code == 200, reference
    start = ask(app, "GET", "/docs/start.js").text
    assert "://" not in start
    assert "openapi.json" in start
    bundle = ask(app, "GET", "/docs/swagger-ui-bundle.js")
    # Version 4 refuses OpenAPI 3.1.
    assert "openapi-3-1" in bundle.text
    check_error(ask(app, "GET", "/docs/../app.py"), 404, "not_found")
    check_error(ask(app, "GET", "/docs/secret.js"), 404, "not_found")
