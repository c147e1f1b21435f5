"""For tests of agents: a context without any service, so an action is a plain call.

from sutazai.testing import context

def test_fetch():
    seen = context()
    page = fetch(FetchParams(url="http://127.0.0.1:8000/"), seen)
    assert seen.progressed[-1][0] == 1.0
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel

from sutazai.agent import Action, Agent, Delegation, System, WorkerView
from sutazai.errors import Unsupported
from sutazai.models import new_id


@dataclass
class RecordedLog:
    """Keeps log lines as (level, event, fields)."""

    lines: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    def debug(self, event: str, **fields: Any) -> None:
        """Keep a line."""
        self.lines.append(("debug", event, fields))

    def info(self, event: str, **fields: Any) -> None:
        """Keep a line."""
        self.lines.append(("info", event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        """Keep a line."""
        self.lines.append(("warning", event, fields))

    def error(self, event: str, **fields: Any) -> None:
        """Keep a line."""
        self.lines.append(("error", event, fields))


class NoSystem:
    """A system in which nothing runs."""

    def workers(self) -> list[WorkerView]:
        """Return no worker."""
        return []

    def resize(self, agent: str, host: str, slots: int) -> int:  # noqa: ARG002
        """Refuse."""
        raise Unsupported("No system runs in this test.")

    def restart_pool(self, agent: str) -> None:
        """Refuse."""
        raise Unsupported(f"{agent} does not run in this test.")

    def restart_process(self, agent: str) -> None:
        """Refuse."""
        raise Unsupported(f"{agent} does not run in this test.")


@dataclass
class RecordedContext:
    """A `Context` that keeps what the action did with it."""

    task_id: UUID = field(default_factory=new_id)
    attempt: int = 1
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    deadline_at: datetime | None = None
    host: str = field(default_factory=socket.gethostname)
    cancelled: bool = False
    agents: Mapping[str, Agent] = field(default_factory=dict)
    system: System = field(default_factory=NoSystem)
    log: RecordedLog = field(default_factory=RecordedLog)
    progressed: list[tuple[float, str]] = field(default_factory=list)
    children: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    written: list[Any] = field(default_factory=list)

    @property
    def idempotency_key(self) -> str:
        """Equal in every attempt of this task."""
        return str(self.task_id)

    def progress(self, fraction: float, message: str = "") -> None:
        """Keep how far the work has come."""
        self.progressed.append((fraction, message))

    def enqueue(
        self, target: Action[Any, Any] | str, params: BaseModel | Mapping[str, Any]
    ) -> UUID:
        """Keep a child as (name, parameters); parameters of an action are validated."""
        if isinstance(target, Action):
            target.parse(params)
        name = target.full_name if isinstance(target, Action) else target
        plain = params.model_dump(mode="json") if isinstance(params, BaseModel) else dict(params)
        self.children.append((name, plain))
        return new_id()

    def delegate(
        self, target: Action[Any, Any] | str, params: BaseModel | Mapping[str, Any]
    ) -> Delegation:
        """Keep a child as `enqueue` does."""
        return Delegation(self.enqueue(target, params))

    def write(self, statement: Any) -> None:
        """Keep a statement."""
        self.written.append(statement)


def context(**values: Any) -> RecordedContext:
    """Return a context for a plain call of an action; keywords replace its fields."""
    return RecordedContext(**values)
