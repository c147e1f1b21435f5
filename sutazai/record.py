"""A task's row as the JSON object that users see, on every front and in the command line."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from sutazai.state import State

if TYPE_CHECKING:
    from sqlalchemy import Row

_FIELDS = (
    "agent",
    "action",
    "state",
    "priority",
    "params",
    "result",
    "error",
    "progress",
    "attempt",
    "max_attempts",
    "parent_id",
    "retry_of",
    "scheduled_by",
    "labels",
    "idempotency_key",
    "created_at",
    "run_at",
    "started_at",
    "finished_at",
    "deadline_at",
    "cancel_requested_at",
    "wait_seconds",
    "run_seconds",
)


def task_json(row: Row[Any]) -> dict[str, Any]:
    """Return the task of a row of `statements.task` or `tasks_page`; instants are text in UTC."""
    values = row._asdict()
    task: dict[str, Any] = {"task_id": str(row.task_id)}
    task.update((name, _plain(values[name])) for name in _FIELDS)
    task["attempts"] = [
        {name: _plain(value) for name, value in _ordered(attempt).items()}
        for attempt in (values.get("attempts") or [])
    ]
    if row.state == State.RUNNING:
        task["attempts"].append(_running_attempt(row))
    task["links"] = links(task["task_id"])
    return task


def links(task_id: str) -> dict[str, str]:
    """Return where a task can be read and cancelled, relative to any front."""
    return {"self": f"/tasks/{task_id}", "cancel": f"/tasks/{task_id}/cancel"}


def _running_attempt(row: Row[Any]) -> dict[str, Any]:
    """Return the attempt under way, which gets a row of its own only when it ends."""
    return _ordered(
        {
            "attempt": row.attempt,
            "worker": row.worker,
            "started_at": _plain(row.started_at),
        }
    )


def _ordered(attempt: dict[str, Any]) -> dict[str, Any]:
    # jsonb sorts keys by length; people read them in this order.
    names = ("attempt", "worker", "started_at", "ended_at", "outcome", "error")
    return {name: attempt.get(name) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, str) and value.endswith("+00:00"):
        return value.removesuffix("+00:00") + "Z"
    return (
        value if isinstance(value, (str, int, float, dict, list)) or value is None else str(value)
    )
