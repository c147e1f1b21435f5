"""What a running action may know and do (`Context`), and ask of the running system (`System`)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from uuid import UUID

from pydantic import BaseModel

if TYPE_CHECKING:
    from sutazai.agent import Action, Agent


class Delegation(NamedTuple):
    """What an action returns to end with the outcome of its child task."""

    task_id: UUID


class Log(Protocol):
    """Log lines of a running task; each carries agent, action, task id and attempt."""

    def debug(self, event: str, /, **fields: Any) -> Any:
        """Log a detail."""

    def info(self, event: str, /, **fields: Any) -> Any:
        """Log what happened."""

    def warning(self, event: str, /, **fields: Any) -> Any:
        """Log what should be looked at."""

    def error(self, event: str, /, **fields: Any) -> Any:
        """Log what went wrong."""


class WorkerView(NamedTuple):
    """One live worker, as an action sees it."""

    name: str
    agent: str
    host: str
    pid: int
    slots: int
    running: int
    heartbeat_age_s: float
    queued: int


class System(Protocol):
    """What an action may ask of the running system; raises `Unsupported` with the reason."""

    def workers(self) -> list[WorkerView]:
        """Return every live worker, and beside it how many due tasks its queue holds."""

    def resize(self, agent: str, host: str, slots: int) -> int:
        """Set the number of slots of an agent's worker on a host; return the number reached."""

    def restart_pool(self, agent: str) -> None:
        """Restart the pool of every worker of an agent."""

    def restart_process(self, agent: str) -> None:
        """Restart the worker processes of an agent on this machine."""


class Context(Protocol):
    """What a running action may know and do."""

    @property
    def task_id(self) -> UUID:
        """The id of the task; also Celery's."""

    @property
    def attempt(self) -> int:
        """1 for the first claim; it only grows."""

    @property
    def idempotency_key(self) -> str:
        """A key that is equal in every attempt, to pass on to other systems."""

    @property
    def created_at(self) -> datetime:
        """When the task was accepted, by the clock of PostgreSQL."""

    @property
    def deadline_at(self) -> datetime | None:
        """When the outcome is of no more use; None: never."""

    @property
    def host(self) -> str:
        """The name of the host that the action runs on."""

    @property
    def cancelled(self) -> bool:
        """Whether somebody has cancelled this task; an action that sees it should return."""

    @property
    def log(self) -> Log:
        """Structured log lines of this task."""

    @property
    def agents(self) -> Mapping[str, Agent]:
        """Every declared agent, by name."""

    @property
    def system(self) -> System:
        """The running system."""

    def progress(self, fraction: float, message: str = "") -> None:
        """Tell how far the work has come, 0 to 1; stored at most once a second."""

    def enqueue(
        self, target: Action[Any, Any] | str, params: BaseModel | Mapping[str, Any]
    ) -> UUID:
        """Start a child task, an action of this agent or `"agent.action"`; return its id.

        It commits at once. A later attempt that makes the same n-th call finds the same child.
        """

    def delegate(
        self, target: Action[Any, Any] | str, params: BaseModel | Mapping[str, Any]
    ) -> Delegation:
        """Start a child task whose outcome becomes this task's: return what this returns."""

    def write(self, statement: Any) -> None:
        """Run an SQLAlchemy statement in the transaction that records the task's outcome."""
