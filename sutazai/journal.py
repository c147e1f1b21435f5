"""The journal of an attempt: progress and log lines, kept for those who follow the task.

Lines go to the worker's log at once, and to PostgreSQL in batches: a second after the first of
them, and before the attempt ends. What PostgreSQL refuses is left out: telling never costs an
outcome.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any
from uuid import UUID

from sutazai import alarm, db, log, payload, redis, statements
from sutazai.errors import DatabaseUnavailable

GATHER_S = 1.0
"""How long lines are gathered, and how long progress waits for the next one."""

MOST_LINES = 1000
MOST_BYTES = 1 << 20
"""Of one task, in all its attempts; what comes after stands in the worker's log only."""

BATCH_MOST = 500
MESSAGE_MOST = 500


class Journal:
    """What one attempt tells. Its methods `debug` to `error` are those of `context.log`."""

    def __init__(self, agent: str, task_id: UUID, claim_id: UUID, attempt: int) -> None:
        self._agent = agent
        self._attempt = (task_id, claim_id)
        self._logger = _logger_of(agent)
        # Whoever writes first gets the lower event id, and must be read first.
        self._writing = threading.Lock()
        self._lines: list[dict[str, Any]] = []
        self._untold: tuple[float, str] | None = None
        self._late: alarm.Call | None = None
        self._told_at = float("-inf")
        self._count = self._bytes = 0
        self._is_counted = attempt == 1

    def debug(self, event: str, /, **fields: Any) -> None:
        """Log a detail."""
        self._keep("debug", event, fields)

    def info(self, event: str, /, **fields: Any) -> None:
        """Log what happened."""
        self._keep("info", event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        """Log what should be looked at."""
        self._keep("warning", event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        """Log what went wrong."""
        self._keep("error", event, fields)

    def progress(self, fraction: float, message: str) -> bool:
        """Store how far the work has come, at most once a second; return whether it was cancelled.

        What comes sooner is stored when the attempt ends, if nothing follows it. An attempt that
        has lost its task counts as cancelled.
        """
        done = 0.0 if math.isnan(fraction) else min(max(float(fraction), 0.0), 1.0)
        self._untold = done, _storable(message)[:MESSAGE_MOST]
        if time.monotonic() - self._told_at < GATHER_S:
            return False
        with self._writing, contextlib.suppress(DatabaseUnavailable):
            return self._tell_progress()
        return False

    def flush(self) -> None:
        """Store what is left before the attempt ends; what PostgreSQL refuses is dropped."""
        with self._writing, contextlib.suppress(DatabaseUnavailable):
            self._tell_lines()
            self._tell_progress()

    def _gathered(self) -> None:
        """Store the lines that were gathered; while PostgreSQL is away they are kept."""
        with self._writing, contextlib.suppress(DatabaseUnavailable):
            self._tell_lines()

    def _tell_progress(self) -> bool:
        """Store the latest progress; return whether the task was cancelled."""
        told = self._untold
        if told is None:
            return False
        fraction, message = told
        self._told_at = time.monotonic()
        rows = self._store(statements.progress(*self._attempt, fraction, message))
        if self._untold is told:
            self._untold = None
        self._announce("progress", fraction=fraction, message=message)
        return rows is not None and (not rows or rows[0].cancel_requested_at is not None)

    def _tell_lines(self) -> None:
        late, self._late = self._late, None
        if late is not None:
            late.cancel()
        if self._lines and not self._is_counted:
            self._make_room()
        while self._lines:
            batch = self._lines[:BATCH_MOST]
            stored = self._store(statements.tell_lines(*self._attempt, batch))
            del self._lines[: len(batch)]
            if stored is not None:
                self._announce("log", lines=len(batch))

    def _make_room(self) -> None:
        """Count, once, what earlier attempts have told; drop the latest lines beyond the bounds."""
        [told] = db.run(statements.told_lines(self._attempt[0]))
        self._is_counted = True
        self._count += told.lines
        self._bytes += told.bytes
        while self._lines and (self._count > MOST_LINES or self._bytes > MOST_BYTES):
            self._count -= 1
            self._bytes -= len(payload.dumps(self._lines.pop()))

    def _store(self, statement: Any) -> Sequence[Any] | None:
        """Run a statement and return its rows; None: PostgreSQL refuses it.

        Raises `DatabaseUnavailable`.
        """
        try:
            return db.run(statement)
        except db.REFUSALS as error:
            self._logger.warning("PostgreSQL refuses what was told", error=str(error)[:500])
            return None

    def _keep(self, level: str, event: str, fields: dict[str, Any]) -> None:
        fields.pop("event", None)  # the line has one
        getattr(self._logger, level)(event, **fields)
        line = {
            **{_storable(name): _plain(value) for name, value in fields.items()},
            "at": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            "level": level,
            "event": _storable(str(event)),
        }
        line.pop("exc_info", None)
        size = len(payload.dumps(line))
        if self._count >= MOST_LINES or self._bytes + size > MOST_BYTES:
            return
        self._count += 1
        self._bytes += size
        self._lines.append(line)
        if self._late is None:
            self._late = alarm.after(GATHER_S, self._gathered)

    def _announce(self, kind: str, **event: Any) -> None:
        redis.announce(self._agent, self._attempt[0], kind=kind, **event)


@cache
def _logger_of(agent: str) -> log.Logger:
    return log.get(f"sutazai.tasks.{agent}")


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, bool | int | float) and abs(value) < 1 << 53):
        return value
    return _storable(str(value))


def _storable(text: str) -> str:
    """Return text as PostgreSQL can hold it."""
    return text.replace("\x00", "\ufffd").encode(errors="replace").decode()
