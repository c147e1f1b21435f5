"""A task's row as the JSON object that users see, on every front and in the command line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sutazai.state import Outcome, State

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
    task["attempts"] = [_ordered(attempt) for attempt in (values.get("attempts") or [])]
    if row.state == State.RUNNING:
        task["attempts"].append(_running_attempt(row))
    task["links"] = links(task["task_id"])
    return task


class Event(NamedTuple):
    """Something that happened to a task, for those who follow it."""

    event_id: int
    """Grows with time; see `statements.progress`."""

    kind: Literal["state", "progress", "log", "result"]
    data: dict[str, Any]


EVENTS_PAGE = 1000
"""Stored events that are read at once."""

_LAST_STATE, _LAST = 998, 999
"""Places within a microsecond: what is stored comes before the change of state that follows it."""


def state_events(row: Row[Any]) -> list[Event]:
    """Return the changes of state that a task's row and its attempts tell of, and the result."""
    task = task_json(row)

    def change(at: str, place: int, state: str, **more: Any) -> Event:
        data = {"task_id": task["task_id"], "state": state, "at": at, **more}
        return Event(_event_id(at, place), "state", data)

    events = [change(task["created_at"], 0, State.QUEUED)]
    for attempt in task["attempts"]:
        who = {"attempt": attempt["attempt"], "worker": attempt["worker"]}
        events.append(change(attempt["started_at"], 0, State.RUNNING, **who))
        if attempt["ended_at"] and attempt["ended_at"] != task["finished_at"]:
            waits = attempt["outcome"] == Outcome.DELEGATED
            state = State.WAITING if waits else State.QUEUED
            more = {**who, "outcome": attempt["outcome"], "error": attempt["error"]}
            events.append(change(attempt["ended_at"], _LAST_STATE, state, **more))
    if task["finished_at"]:
        at = task["finished_at"]
        events.append(change(at, _LAST_STATE, task["state"], error=task["error"]))
        events.append(Event(_event_id(at, _LAST), "result", task))
    return events


def events(row: Row[Any], after: int) -> list[Event]:
    """Return what happened after an event, in order, of a row of `statements.followed`."""
    told = [Event(*item) for item in row.told or []]
    changes = [event for event in state_events(row) if event.event_id > after]
    if len(told) >= EVENTS_PAGE:
        changes = [event for event in changes if event.event_id < told[-1].event_id]
    return sorted([*told, *changes], key=lambda event: event.event_id)


def _event_id(at: str, place: int) -> int:
    since = datetime.fromisoformat(at) - _EPOCH
    return since // timedelta(microseconds=1) * 1000 + place


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def queue_json(row: Row[Any], limit: int | None) -> dict[str, Any]:
    """Return how a queue stands, of a row of `statements.status`."""
    age_s = row.oldest_age_s
    return {
        "agent": row.agent,
        "paused": row.paused,
        "draining": row.draining,
        "depth": row.depth,
        "oldest_age_s": None if age_s is None else round(float(age_s), 3),
        "held": row.held,
        "running": row.running,
        "slots": sum(worker["slots"] for worker in row.workers or []),
        "workers": len(row.workers or []),
        "limit": limit,
    }


def links(task_id: str) -> dict[str, str]:
    """Return where a task can be read and cancelled, relative to any front."""
    return {
        "self": f"/tasks/{task_id}",
        "events": f"/tasks/{task_id}/events",
        "cancel": f"/tasks/{task_id}/cancel",
    }


def _running_attempt(row: Row[Any]) -> dict[str, Any]:
    """Return the attempt under way, which gets a row of its own only when it ends."""
    return _ordered(
        {
            "attempt": row.attempt,
            "worker": row.worker,
            "started_at": row.started_at,
        }
    )


def _ordered(attempt: dict[str, Any]) -> dict[str, Any]:
    # jsonb sorts keys by length; people read them in this order. It also writes instants without
    # trailing zeros, which is not how the same instant is written elsewhere.
    names = ("attempt", "worker", "started_at", "ended_at", "outcome", "error")
    ordered = {name: _plain(attempt.get(name)) for name in names}
    for name in ("started_at", "ended_at"):
        if ordered[name]:
            ordered[name] = _plain(datetime.fromisoformat(ordered[name]))
    return ordered


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, str) and value.endswith("+00:00"):
        return value.removesuffix("+00:00") + "Z"
    return (
        value if isinstance(value, (str, int, float, dict, list)) or value is None else str(value)
    )
