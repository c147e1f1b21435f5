"""The bell: how a row becomes a notice on the broker, without knowing which broker.

A notice says only "this task waits on this queue". It may be lost, doubled or late: a notice for a
task that is not due does nothing, and a due task whose notice was lost is rung again by the relay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol
from uuid import UUID

NOTICE_HEADER = "sutazai-ring"
SUMMARY_CHARACTERS = 100


class Notice(NamedTuple):
    """What the broker carries of a task."""

    task_id: UUID
    agent: str
    action: str
    priority: int
    host: str | None
    time_limit_s: float | None
    """None: the task first waits, nobody knows how long, until nothing runs beside it."""
    summary: str
    """The parameters as text, cut to 100 characters, for people who watch the broker."""


class Bell(Protocol):
    """Publishes notices, off the caller's path."""

    def room(self, agent: str, priority: int) -> bool:
        """Whether the queue's window admits one more notice of this priority; a guess ≤ 1 s old."""

    def depth(self, agent: str) -> int | None:
        """How many notices lie on the queue now; None when the broker does not answer."""

    def forgotten(self) -> str | None:
        """Which life of the broker this is, if it lost its queues since `remember`; else None.

        None too when the broker does not answer. Whoever is told rings again what was rung,
        commits that, and then calls `remember`.
        """

    def remember(self, life: str) -> None:
        """Leave a mark that the broker loses together with its queues."""

    def ring(self, notices: Sequence[Notice]) -> None:
        """Publish soon and return at once; a failure makes the rows due again after a second."""


WINDOW_MIN = 100
WINDOW_MAX = 1000
WINDOWS_KEY = "sutazai:windows"
"""Redis hash, agent → how many notices its queue may hold; the relay writes what it measured."""


def window(drained_per_s: float, slots: int) -> int:
    """Return how many notices a queue may hold: what it drains in 2 s, within bounds.

    Rows beyond it stay in PostgreSQL, so the broker stays small and order stays changeable.
    """
    return int(min(WINDOW_MAX, max(2 * drained_per_s, 2 * slots, WINDOW_MIN)))


def summarise(params: str) -> str:
    """Cut parameters, as JSON text, to what a notice may carry."""
    return params if len(params) <= SUMMARY_CHARACTERS else params[: SUMMARY_CHARACTERS - 1] + "…"
