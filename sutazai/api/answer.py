"""Answers: JSON, and one shape for every error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import Response

from sutazai.errors import SutazaiError

RETRY_AFTER_S = 1


def json_answer(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer whose body is JSON."""
    body = orjson.dumps(content, option=orjson.OPT_UTC_Z)
    return Response(body, status, headers, media_type="application/json")


def error_answer(
    status: int,
    code: str,
    message: str,
    *,
    details: Sequence[Any] = (),
    task_id: str | None = None,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> Response:
    """Return an error: `code` for programs, `message` a sentence that says what to do."""
    content = {
        "status": "error",
        "code": code,
        "message": message,
        "details": list(details),
        "task_id": task_id,
        **more,
    }
    return json_answer(content, status, headers)


def refusal(error: SutazaiError) -> Response:
    """Return what an error of ours looks like from outside."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
    return error_answer(
        error.status, error.code, str(error), details=error.details, headers=headers
    )
