"""The states of a task, the moves between them, and the outcomes of an attempt."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a task stands."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can follow."""
        return not MOVES[self]


class Outcome(StrEnum):
    """How one attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    LOST = "lost"
    RELEASED = "released"
    CANCELLED = "cancelled"
    DELEGATED = "delegated"


MOVES: dict[State, frozenset[State]] = {
    # claim; deadline passed or action unknown; cancelled before it ran
    State.QUEUED: frozenset({State.RUNNING, State.FAILED, State.CANCELLED}),
    # retry, rescue and drain lead back to queued; delegate to waiting; the rest is finish
    State.RUNNING: frozenset(
        {State.QUEUED, State.WAITING, State.SUCCEEDED, State.FAILED, State.CANCELLED}
    ),
    # the outcome of the child becomes the parent's
    State.WAITING: frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}
"""Every allowed move; docs/lifecycle.md draws it, a test walks every pair."""

TERMINAL = tuple(state.value for state in State if state.is_terminal)
