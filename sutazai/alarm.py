"""Calls that are made unless they are called off first, which nearly all of them are.

A `threading.Timer` starts a thread for each, whether it will be needed or not. Here one thread of
the process waits for all, and only what comes due gets a thread of its own. A call that is called
off leaves the waiting thread asleep: so to plan thousands a second wakes it some times a second.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
import threading
import time
from collections.abc import Callable


class Call:
    """A planned call."""

    __slots__ = ("_work",)

    def __init__(self, work: Callable[[], object]) -> None:
        self._work: Callable[[], object] | None = work

    def cancel(self) -> None:
        """Call it off; does nothing once it has begun."""
        self._work = None

    def _begin(self) -> None:
        work = self._work
        if work is not None:
            # What comes due may wait for a store, and must not keep the others waiting.
            threading.Thread(target=work, name="alarm-call", daemon=True).start()


class Alarm:
    """Begins calls when their time has come, to a moment."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._planned: list[tuple[float, int, Call]] = []
        self._numbers = itertools.count()
        self._sleeps_until = math.inf
        self._thread: threading.Thread | None = None

    def after(self, delay_s: float, work: Callable[[], object]) -> Call:
        """Plan a call on a thread of its own."""
        call = Call(work)
        at = time.monotonic() + delay_s
        with self._changed:
            heapq.heappush(self._planned, (at, next(self._numbers), call))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="alarm", daemon=True)
                self._thread.start()
            elif at < self._sleeps_until:
                self._changed.notify()
        return call

    def _run(self) -> None:
        while True:
            for call in self._await_due():
                call._begin()

    def _await_due(self) -> list[Call]:
        with self._changed:
            while True:
                now = time.monotonic()
                due: list[Call] = []
                while self._planned and self._planned[0][0] <= now:
                    due.append(heapq.heappop(self._planned)[2])
                if due:
                    self._sleeps_until = now  # it looks again before it sleeps
                    return due
                self._sleeps_until = self._planned[0][0] if self._planned else math.inf
                left_s = self._sleeps_until - now
                self._changed.wait(None if math.isinf(left_s) else left_s)


_alarm = Alarm()


def after(delay_s: float, work: Callable[[], object]) -> Call:
    """Plan a call on a thread of its own, by this process's alarm."""
    return _alarm.after(delay_s, work)


def _forget() -> None:
    global _alarm  # noqa: PLW0603 - threads do not survive a fork
    _alarm = Alarm()


os.register_at_fork(after_in_child=_forget)
