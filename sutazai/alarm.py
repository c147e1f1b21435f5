"""Calls that are made unless they are called off first, which nearly all of them are.

A `threading.Timer` starts a thread for each, whether it will be needed or not. Here one thread of
the process waits for all, and only what comes due gets a thread of its own. It sleeps until the
first of what is planned, and forgets then what was called off before the next: thousands of calls
a second, each planned for 50 ms and called off, wake it some tens of times.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
import threading
import time
from collections.abc import Callable

AGAIN_S = 1.0
"""A call is put off so long when there are as many threads as there may be."""


class Call:
    """A planned call."""

    __slots__ = ("_work",)

    def __init__(self, work: Callable[[], object]) -> None:
        self._work: Callable[[], object] | None = work

    def cancel(self) -> None:
        """Call it off; does nothing once it has begun."""
        self._work = None

    @property
    def is_off(self) -> bool:
        """Whether it was called off."""
        return self._work is None

    def begin(self) -> bool:
        """Make the call, on a thread of its own: it may wait for a store. False: there is none."""
        work = self._work
        if work is not None:
            try:
                threading.Thread(target=work, name="alarm-call", daemon=True).start()
            except RuntimeError:
                return False
        return True


class Alarm:
    """Begins calls when their time has come."""

    def __init__(self) -> None:
        # Entered itself, not through the condition, whose methods are Python's: so a signal handler
        # that raises cannot leave it locked, and one that plans a call can enter it again.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._planned: list[tuple[float, int, Call]] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self.sleeps_until = 0.0
        """When the thread looks again by itself; infinite without a plan, 0 before it runs."""

    def after(self, delay_s: float, work: Callable[[], object]) -> Call:
        """Plan a call on a thread of its own."""
        call = Call(work)
        with self._lock:
            at = self._plan(delay_s, call)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="alarm", daemon=True)
                thread.start()
                self._thread = thread
            elif at < self.sleeps_until:
                self._changed.notify()
        return call

    def _plan(self, delay_s: float, call: Call) -> float:
        at = time.monotonic() + delay_s
        heapq.heappush(self._planned, (at, next(self._numbers), call))
        return at

    def _run(self) -> None:
        with self._lock:
            while True:
                while self._planned and self._planned[0][2].is_off:
                    heapq.heappop(self._planned)
                self.sleeps_until = self._planned[0][0] if self._planned else math.inf
                left_s = self.sleeps_until - time.monotonic()
                if left_s > 0:
                    self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
                    continue
                _, _, call = heapq.heappop(self._planned)
                if not call.begin():
                    self._plan(AGAIN_S, call)


_alarm = Alarm()


def after(delay_s: float, work: Callable[[], object]) -> Call:
    """Plan a call on a thread of its own, by this process's alarm."""
    return _alarm.after(delay_s, work)


def _forget() -> None:
    global _alarm  # noqa: PLW0603 - threads do not survive a fork
    _alarm = Alarm()


os.register_at_fork(after_in_child=_forget)
