"""Celery's `revoke` and `terminate` as durable cancels, whether a worker lives or not.

Celery only broadcasts them: workers that are away never learn of it, and forget it when they end.
Here the sender writes the rows before it broadcasts, and a worker does the same for a sender that
does not have our application. The signal of `terminate` has no meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from celery.app.control import Control as Broadcasting
from celery.worker.control import Panel

from sutazai import db, lifecycle, redis


class Control(Broadcasting):  # type: ignore[misc]
    """Celery's remote control, which cancels what it tells the workers to revoke."""

    def broadcast(
        self, command: str, arguments: Mapping[str, Any] | None = None, *args: Any, **options: Any
    ) -> Any:
        """Send a command to the workers; raises `DatabaseUnavailable` for one that cancels."""
        if command in ("revoke", "terminate"):
            _cancel((arguments or options).get("task_id"))
        return super().broadcast(command, arguments, *args, **options)


@Panel.register(
    name="revoke",
    type="control",
    help="Cancel tasks, durably.",
    variadic="task_id",
    signature="[id1 [id2 [… [idN]]]]",
)
def _revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **_: Any) -> Any:  # noqa: ARG001, FBT
    ids = ", ".join(_cancel(task_id))
    return {"ok": f"cancelled: {ids or 'nothing, no id of a task was given'}"}


@Panel.register(
    name="terminate",
    type="control",
    help="Cancel tasks, durably; the signal has no meaning here.",
    args=[("signal", str)],
    variadic="task_id",
    signature="<signal> [id1 [id2 [… [idN]]]]",
)
def _terminate(state: Any, signal: Any, task_id: Any, **_: Any) -> Any:  # noqa: ARG001 - Celery passes it
    return _revoke(state, task_id)


def _cancel(task_id: str | Iterable[str] | None) -> list[str]:
    """Cancel the tasks of one id or of several; return the ids, without what is none."""
    given = [task_id] if isinstance(task_id, str) else list(task_id or ())
    ids = [wanted for wanted in map(_uuid, given) if wanted is not None]
    ended = []
    with db.transaction() as connection:
        for wanted in ids:
            ended += lifecycle.cancel(connection, wanted)
    redis.announce_ended(ended)
    return [str(wanted) for wanted in ids]


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
