"""Structured logs: one line an event, for people (console) or machines (JSON).

Within a running task every line carries agent, action, task_id and attempt, also lines of the
standard library's loggers; within a request, request_id.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.typing import FilteringBoundLogger, Processor

Logger = FilteringBoundLogger

_SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
]

QUIET = (
    "alembic",
    "asyncio",
    "celery.app.trace",
    "celery.worker.strategy",
    "httpcore",
    "httpx",
    "urllib3",
    "uvicorn.access",
)
"""Loggers whose routine lines tell an operator nothing."""


def configure(form: str = "console", level: str = "info") -> None:
    """Send every log line of this process to standard error, in one form."""
    if form == "json":
        renderer: list[Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        renderer = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        # What is below the level costs nothing but the call.
        wrapper_class=structlog.make_filtering_bound_logger(root.level),
        cache_logger_on_first_use=False,
    )


def get(name: str, **bound: Any) -> Logger:
    """Return a logger; the name is the module's."""
    logger: Logger = structlog.get_logger(name, **bound)
    return logger


def bind(**values: Any) -> None:
    """Add fields to every further line of this asyncio task; it is to end soon."""
    structlog.contextvars.bind_contextvars(**values)


@contextmanager
def fields(**values: Any) -> Iterator[None]:
    """Add fields to every line that is logged within, on this thread or in this asyncio task."""
    # As structlog's own `bound_contextvars`, which reads all fields there are before.
    before = structlog.contextvars.bind_contextvars(**values)
    try:
        yield
    finally:
        structlog.contextvars.reset_contextvars(**before)
