"""The bell: how a row becomes a notice on the broker, without knowing which broker.

A notice says only "this task waits on this queue". It may be lost, doubled or late: a notice for a
task that is not due does nothing, and a due task whose notice was lost is rung again by the relay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol
from uuid import UUID

NOTICE_HEADER = "sutazai-ring"
HAND_HEADER = "sutazai-hand"
"""The ids of the further tasks that a message names, in the order in which they are to run."""

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

    is_plain: bool = False
    """Whether it may be taken in hand together with others: no key, no host, never crashed."""


class Bell(Protocol):
    """Publishes notices, off the caller's path; several of them in one message, where they fit."""

    def room(self, agent: str, priority: int) -> bool:
        """Whether the queue's window admits one more notice of this priority; a guess ≤ 1 s old."""

    def depth(self, agent: str) -> int | None:
        """How many messages lie on the queue now; None when the broker does not answer."""

    def levels(self, agent: str) -> Mapping[int, int] | None:
        """About how many notices lie on the queue now, by priority; None: the broker is silent."""

    def forgotten(self) -> str | None:
        """Which life of the broker this is, if it lost its queues since `remember`; else None.

        None too when the broker does not answer. Whoever is told rings again what was rung,
        commits that, and then calls `remember`.
        """

    def remember(self, life: str) -> None:
        """Leave a mark that the broker loses together with its queues."""

    def ring(self, notices: Sequence[Notice], pace: Pace | None = None) -> None:
        """Publish soon and return at once; a failure makes the rows due again after a second.

        pace: the queue's, when the caller has just measured it.
        """


WINDOW_MIN = 100
WINDOW_MAX = 1000
TOGETHER_S = 0.1
"""A message names as many tasks as one slot drains in this time, at most `TOGETHER_MAX`."""

TOGETHER_MAX = 16
PACES_KEY = "sutazai:paces"
"""Redis hash, agent → the pace of its queue; the relay writes what it measured."""


class Pace(NamedTuple):
    """How fast a queue is drained, and what follows for its notices."""

    window: int = WINDOW_MIN
    """How many tasks may be rung: what is drained in 2 s, within bounds.

    Rows beyond it stay in PostgreSQL, so the broker stays small and order stays changeable.
    """

    together: int = 1
    """How many tasks one message may name."""

    is_behind: bool = False
    """Whether rows wait that were never rung: then new ones wait behind them."""

    def __str__(self) -> str:
        return " ".join(str(int(part)) for part in self)

    @classmethod
    def read(cls, text: str) -> Pace:
        """Return what `str` wrote."""
        size, together, is_behind = map(int, text.split())
        return cls(size, together, bool(is_behind))


def pace(drained_per_s: float, slots: int, *, is_behind: bool = False) -> Pace:
    """Return the pace of a queue that drains so many tasks a second with so many slots."""
    size = min(WINDOW_MAX, max(2 * drained_per_s, 2 * slots, WINDOW_MIN))
    together = min(TOGETHER_MAX, max(1, drained_per_s / max(1, slots) * TOGETHER_S))
    return Pace(int(size), int(together), is_behind)


def above(levels: Mapping[int, int]) -> range:
    """Return the priorities that are more urgent than all that lies on a queue.

    Only these may be rung beyond the window: what is less urgent would be taken as soon as the
    queue is empty for a moment, before what still waits in PostgreSQL.
    """
    return range(max((level for level, count in levels.items() if count), default=-1) + 1, 10)


def bundled(notices: Sequence[Notice], most: Callable[[str], int]) -> Iterator[list[Notice]]:
    """Put neighbours of one action and priority into one message; most: how many, of an agent."""
    bundle: list[Notice] = []
    for notice in notices:
        if bundle and not _fits(notice, bundle, most(notice.agent)):
            yield bundle
            bundle = []
        bundle.append(notice)
    if bundle:
        yield bundle


def _fits(notice: Notice, bundle: Sequence[Notice], most: int) -> bool:
    first = bundle[0]
    same = (notice.agent, notice.action, notice.priority)
    is_plain = notice.is_plain and first.is_plain
    return is_plain and same == (first.agent, first.action, first.priority) and len(bundle) < most


def summarise(params: str) -> str:
    """Cut parameters, as JSON text, to what a notice may carry."""
    return params if len(params) <= SUMMARY_CHARACTERS else params[: SUMMARY_CHARACTERS - 1] + "…"
