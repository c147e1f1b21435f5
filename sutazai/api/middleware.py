"""What happens to every request: an id, a log line, metrics, and an answer, whatever is raised.

Plain ASGI, because Starlette's BaseHTTPMiddleware runs every request in a task of its own.
"""

from __future__ import annotations

import logging
import re
import time

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sutazai import log
from sutazai.api.answer import error_answer, refusal
from sutazai.errors import MethodNotAllowed, NotFound, SutazaiError
from sutazai.metrics import UNMATCHED, FrontMetrics
from sutazai.models import new_id

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,200}")

_logger = log.get(__name__)
_standard_logger = logging.getLogger(__name__)


class Entrance:
    """The outermost layer of a front."""

    def __init__(self, app: ASGIApp, metrics: FrontMetrics, agent: str) -> None:
        self._app = app
        self._metrics = metrics
        self._agent = agent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        began = time.perf_counter()
        log.bind(request_id=request_id)  # each request is handled in a task of its own
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            _logger.debug("the client went away", path=scope["path"])
        except Exception as error:
            answer = None if status else _refusal_of(error, scope)
            if answer is None:
                _logger.exception("a request failed", method=scope["method"], path=scope["path"])
                answer = _internal_error()
            if not status:
                await answer(scope, receive, send_with_id)
        seconds = time.perf_counter() - began
        # Nothing was sent to a client that went away; nginx counts that as 499 too.
        self._metrics.observe(_template(scope), status or 499, seconds)
        self._log(scope, status, seconds)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        level = logging.ERROR if status >= 500 else logging.DEBUG
        if _standard_logger.isEnabledFor(level):
            _logger.log(
                level,
                "request",
                agent=self._agent,
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=round(seconds, 4),
            )


def _request_id(scope: Scope) -> str:
    values = (value for name, value in scope["headers"] if name == b"x-request-id")
    given: str = next(values, b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else new_id().hex


def _template(scope: Scope) -> str:
    route = scope.get("route")
    path = getattr(route, "path", UNMATCHED)
    return str(path)


def _refusal_of(error: Exception, scope: Scope) -> ASGIApp | None:
    """Return the answer to what is refused; None: the error is a fault of ours."""
    if isinstance(error, SutazaiError):
        return refusal(error)
    if not isinstance(error, HTTPException):
        return None
    # What Starlette refuses: unknown addresses and wrong methods; and a body that dawdles.
    if error.status_code == 404:
        return refusal(NotFound(f"There is nothing at {scope['path']}; see /docs."))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return error_answer(
            405,
            MethodNotAllowed.code,
            f"{scope['method']} is not allowed here; allowed: {allowed}.",
            headers=error.headers,
        )
    code = "request_timeout" if error.status_code == 408 else SutazaiError.code
    return error_answer(error.status_code, code, error.detail, headers=error.headers)


def _internal_error() -> ASGIApp:
    return error_answer(500, SutazaiError.code, "The front failed; its log says why.")
