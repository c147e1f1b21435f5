"""How many notices a worker holds, those that it works on included.

Celery prefetches a fixed multiple of the slots. For short tasks that saves waiting on the broker;
with long ones a worker would sit on notices that another one, with free slots, could take at once,
and an urgent task would wait behind them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import MethodType
from typing import Any

from celery import bootsteps
from celery.worker import state

RECENT_S = 1.0
"""So often what a worker has worked off is counted anew; it may hold as much in advance."""


class Appetite:
    """How many notices may be held: one a slot, and as many as have been worked off just now."""

    def __init__(
        self,
        slots: Callable[[], int],
        finished: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin; finished: how many notices the worker has worked off since it was started."""
        self._slots = slots
        self._finished = finished
        self._clock = clock
        self._counted_at, self._counted = clock(), finished()
        self._base = self._counted

    def most(self) -> int:
        """Return the limit now; what was worked off counts for some seconds at most."""
        now, finished = self._clock(), self._finished()
        age_s = now - self._counted_at
        if age_s >= RECENT_S:
            self._base = self._counted if age_s < 2 * RECENT_S else finished
            self._counted_at, self._counted = now, finished
        return max(1, self._slots()) + finished - self._base


class Prefetch(bootsteps.StartStopStep):  # type: ignore[misc]
    """Bounds what a worker with a pool of processes takes from Redis.

    All other pools, and RabbitMQ, keep to the multiplier.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Put the bound before kombu's own, on the channel of this connection."""
        qos = getattr(parent.task_consumer.channel, "qos", None)
        if qos is None or not parent.pool.uses_semaphore:
            return  # a thread that is free again does not wake the loop which would take the next
        within_multiplier = qos.can_consume
        # Celery's autoscaler sees by what is held that there is more to do.
        appetite = Appetite(
            lambda: parent.controller.max_concurrency or slots_of(parent), _finished
        )

        def can_consume(_: Any) -> bool:
            is_hungry = len(state.reserved_requests) < appetite.most()
            return is_hungry and bool(within_multiplier())

        qos.can_consume = MethodType(can_consume, qos)


def slots_of(parent: Any) -> int:
    """Return how many tasks the pool runs at once; none, while it has stopped."""
    try:
        return int(parent.pool.num_processes or 1)
    except AttributeError:
        return 0


def _finished() -> int:
    return int(state.all_total_count[0]) - len(state.active_requests)
