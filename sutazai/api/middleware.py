"""What happens to every request: an id, a log line, metrics, and no trace shown to clients.

Plain ASGI, because Starlette's BaseHTTPMiddleware runs every request in a task of its own.
"""

from __future__ import annotations

import logging
import re
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sutazai import log
from sutazai.api.answer import error_answer
from sutazai.errors import SutazaiError
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
        except Exception:
            _logger.exception("a request failed", method=scope["method"], path=scope["path"])
            if not status:
                await _internal_error()(scope, receive, send_with_id)
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


def _internal_error() -> ASGIApp:
    return error_answer(500, SutazaiError.code, "The front failed; its log says why.")
