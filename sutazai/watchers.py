"""What a worker tells those who watch it: task events, only while somebody asks, and in batches.

Flower and `celery events` turn task events on. As Celery sends them, they go out between taking a
notice and starting its task, and they stay on after the last watcher has gone.
"""

from __future__ import annotations

import time
from typing import Any

from celery import bootsteps
from celery.worker.control import Panel, enable_events

from sutazai import log

LAST_S = 30.0
"""Task events end this long after somebody last asked for them; Flower asks every 5 s."""

BATCH_S = 0.25
"""How long task events are gathered before they are published as one message."""

BATCH_MOST = 1000

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
