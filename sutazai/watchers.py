"""What a worker tells those who watch it: task events, only while somebody asks, and in batches.

Flower and `celery events` turn task events on. As Celery sends them, they go out between taking a
notice and starting its task, and they stay on after the last watcher has gone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

import orjson
from celery import bootsteps
from celery.worker.control import Panel, enable_events
from celery.worker.request import Request

from sutazai import log
from sutazai.bell import HAND_HEADER, TOGETHER_MAX
from sutazai.hand import Told
from sutazai.state import State

LAST_S = 30.0
"""Task events end this long after somebody last asked for them; Flower asks every 5 s."""

BATCH_S = 0.25
"""How long task events are gathered before they are published as one message."""

BATCH_MOST = 1000

TEXT_MOST = 60
"""Characters of a result that are told of each task of a hand; Celery cuts what is too long."""

_asked_at = 0.0

_logger = log.get(__name__)


class BatchEvents(bootsteps.StartStopStep):  # type: ignore[misc]
    """Lets a consumer publish its task events a few times a second instead of at each one."""

    requires = ("celery.worker.consumer.events:Events",)

    def start(self, parent: Any) -> None:
        """Gather from now on; pools without an event loop publish each event by itself."""
        if parent.hub is None:
            return
        dispatcher = parent.event_dispatcher
        planned = False

        def plan() -> None:
            nonlocal planned
            if not planned:
                planned = True
                parent.hub.call_later(BATCH_S, publish)

        def publish() -> None:
            nonlocal planned
            planned = False
            dispatcher.flush()

        dispatcher.buffer_limit = BATCH_MOST
        dispatcher.on_send_buffered = plan


def end_unwatched(parent: Any) -> None:
    """Turn a worker's task events off when nobody has asked for them lately."""
    dispatcher = getattr(parent.consumer, "event_dispatcher", None)
    if (
        dispatcher is not None
        and "task" in (dispatcher.groups or ())
        and time.monotonic() - _asked_at > LAST_S
    ):
        dispatcher.groups.discard("task")
        _logger.info("task events off: nobody has asked for them")


@Panel.register(name="enable_events", type="control", help="Tell worker(s) to send task events.")
def _enable_events(state: Any) -> Any:
    global _asked_at  # noqa: PLW0603 - remote control comes to the process, not to an object
    _asked_at = time.monotonic()
    return enable_events(state)


# --- several tasks in one message -----------------------------------------------------------


def others_of(message: Any) -> list[UUID]:
    """Return the further tasks that a message names; none, when they are not as we write them."""
    found = message.get(HAND_HEADER)
    if not isinstance(found, list) or not 0 < len(found) < TOGETHER_MAX:
        return []
    try:
        return [UUID(each) for each in found]
    except (ValueError, TypeError, AttributeError):
        return []


def tell(told: Sequence[Told]) -> str:
    """Write how the tasks of a hand went, as the result of its message."""
    return orjson.dumps(
        [(str(each.task_id), each.state, each.ran_s, each.text[:TEXT_MOST]) for each in told]
    ).decode()


def _read(result: str) -> list[tuple[str, State, float, str]]:
    """Read what `tell` wrote, which Celery has put into apostrophes meanwhile."""
    try:
        rows = orjson.loads(result[1:-1].replace("\\'", "'"))
    except ValueError:
        return []
    return [(task_id, State(state), ran_s, text) for task_id, state, ran_s, text in rows]


class HandRequest(Request):  # type: ignore[misc]
    """A message in the worker's main process, which tells of each task that it names."""

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002 - Celery's name
        """Send an event; for a hand, those of all its tasks instead."""
        is_watched = self._eventer and "task" in (self._eventer.groups or ("task",))
        others = others_of(self.request_dict) if is_watched else []
        if not others:
            super().send_event(type, **fields)
            return
        for kind, values in self._events(type, others, fields):
            self._eventer.send(kind, **values)

    def _events(
        self, kind: str, others: Sequence[UUID], fields: dict[str, Any]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        match kind:
            case "task-started":
                yield kind, {"uuid": self.id, **fields}
                for each in map(str, others):
                    names = {"uuid": each, "name": self.name, "root_id": each, "parent_id": None}
                    more = {"args": "", "kwargs": "", "retries": 0, "eta": None, "expires": None}
                    yield "task-received", {**names, **more}
                    yield "task-started", {"uuid": each}
            case "task-succeeded":
                for task_id, state, ran_s, text in _read(fields["result"]):
                    yield _ended(state, task_id, ran_s, text)
            case _:
                for each in (self.id, *map(str, others)):
                    yield kind, {"uuid": each, **fields}


def _ended(state: State, task_id: str, ran_s: float, text: str) -> tuple[str, dict[str, Any]]:
    """Return the event of how a task of a hand went."""
    match state:
        case State.SUCCEEDED:
            return "task-succeeded", {"uuid": task_id, "result": text, "runtime": ran_s}
        case State.CANCELLED:
            how = {"terminated": False, "signum": None, "expired": False}
            return "task-revoked", {"uuid": task_id, **how}
        case State.FAILED:
            return "task-failed", {"uuid": task_id, "exception": text, "traceback": ""}
        case _:
            return "task-retried", {"uuid": task_id, "exception": "", "traceback": ""}
