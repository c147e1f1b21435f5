"""A task's row as the JSON object that users see, on every front and in the command line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import UUID

from sutazai import statements
from sutazai.state import Outcome, State

if TYPE_CHECKING:
    from sqlalchemy import Row, TextClause

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
    """Grows with time; see `statements.progress`, and `events` for the end."""

    kind: Literal["state", "progress", "log", "result"]
    data: dict[str, Any]


EVENTS_PAGE = 1000
"""Stored events that are read at once, at least."""

_LAST_STATE, _LAST = 998, 999
"""Places within a microsecond: what is stored comes before the change of state that follows it."""

_END = 2
"""Events that end every task: the last change of state, and the result."""


def follow(task_id: UUID, after: int) -> TextClause:
    """Return the statement whose row `events` takes, with the same `after`."""
    return statements.followed(task_id, after - _END, EVENTS_PAGE + _END)


def events(row: Row[Any], after: int) -> list[Event]:
    """Return what happened after an event, in order; of an ended task nothing after its result.

    The end comes last, whatever the clock says: `finished_at` is when its transaction began, which
    may be before an event that others have committed meanwhile. Its two ids then follow those of
    all other events; so what an id stands for can be told from the events before it.
    """
    task = task_json(row)
    told = [Event(*item) for item in row.told or []]
    known = sorted([*told, *_changes(task)], key=lambda event: event.event_id)
    news = [event for event in known if event.event_id > after]
    if len(told) >= EVENTS_PAGE + _END:
        return [event for event in news if event.event_id <= told[-1].event_id]
    if not task["finished_at"]:
        return news
    end_id = _event_id(task["finished_at"], _LAST_STATE)
    ids = {event.event_id for event in known}
    if after >= end_id and after not in ids:
        is_state = after == end_id or after - 1 in ids
        return _end(task, after)[1:] if is_state else []
    last = max(ids)
    return [*news, *_end(task, max(end_id, last + 1))]


def _changes(task: dict[str, Any]) -> list[Event]:
    """Return the changes of state that a task and its attempts tell of, but for the last one."""
    events = [_change(task, _event_id(task["created_at"], 0), task["created_at"], State.QUEUED)]
    for attempt in task["attempts"]:
        who = {"attempt": attempt["attempt"], "worker": attempt["worker"]}
        began, ended = attempt["started_at"], attempt["ended_at"]
        events.append(_change(task, _event_id(began, 0), began, State.RUNNING, **who))
        if ended and ended != task["finished_at"]:
            waits = attempt["outcome"] == Outcome.DELEGATED
            state = State.WAITING if waits else State.QUEUED
            more = {**who, "outcome": attempt["outcome"], "error": attempt["error"]}
            events.append(_change(task, _event_id(ended, _LAST_STATE), ended, state, **more))
    return events


def _end(task: dict[str, Any], event_id: int) -> list[Event]:
    """Return the last change of state and the result, whose ids follow each other."""
    state = _change(task, event_id, task["finished_at"], task["state"], error=task["error"])
    return [state, Event(event_id + 1, "result", task)]


def _change(task: dict[str, Any], event_id: int, at: str, state: str, **more: Any) -> Event:
    return Event(event_id, "state", {"task_id": task["task_id"], "state": state, "at": at, **more})


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
