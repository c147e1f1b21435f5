"""Every route against the front's own OpenAPI document, with data that fits it and does not."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import pytest
import schemathesis
from hypothesis import settings
from schemathesis import Case, CheckContext, Response, checks

from sutazai.api import openapi
from tests.integration.served import Front, agent

DOCUMENT = openapi.describe(agent)

schema = schemathesis.openapi.from_dict(DOCUMENT)


def test_the_front_serves_this_document(front: Front) -> None:
    assert front.client.get("/openapi.json").json() == DOCUMENT


@pytest.fixture
def known(front: Front) -> list[str]:
    ids = [front.queue(action) for action in ("add", "nothing")]
    front.client.post(f"/tasks/{ids[0]}/cancel")
    done = front.client.post("/process", json={"action": "add", "first": 1}).json()["task_id"]
    body = {"name": "nightly", "action": "nothing", "every_s": 86_400}
    assert front.client.post("/schedules", json=body).status_code == 201
    return [ids[0], done, ids[1]]


@pytest.fixture(autouse=True)
def _open_queue(front: Front) -> Iterator[None]:
    yield
    front.client.post("/queue/resume")


def no_failure_of_the_front(_: CheckContext, response: Response, case: Case) -> None:
    """A 5xx is a task's failure, which names it, or a service that is away, which says until when.

    In place of `not_a_server_error`, which knows no failures but the server's own.
    """
    if response.status_code < 500:
        return
    body = response.json()
    if response.status_code == 503 and case.path.startswith("/health"):
        return
    excused = response.status_code == 503 and "retry-after" in response.headers
    assert excused or body["task_id"], body


CHECKS = [
    no_failure_of_the_front,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


@schema.parametrize()
@settings(max_examples=15)
def test_every_answer_is_as_documented(case: Case, front: Front, known: list[str]) -> None:
    # Invented ids lead nowhere: two of three become those of real tasks.
    task_id = str((case.path_parameters or {}).get("task_id", ""))
    try:
        chosen = UUID(task_id).int % (len(known) + 1)
    except ValueError:
        chosen = len(known)
    if chosen < len(known) - (case.method == "GET"):  # the last never ends, and would be waited for
        case.path_parameters["task_id"] = known[chosen]
    front.bell.paused = False
    case.call_and_validate(front.url, checks=CHECKS, timeout=20)
    if case.path.startswith("/queue/"):
        front.client.post("/queue/resume")
