"""A submission: what every way in (routes, command line, schedules, children, Celery) hands over.

It validates the parameters against the action once, and gives both the row to insert and the
notice to ring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
)

from sutazai import payload
from sutazai.agent import Action
from sutazai.bell import Notice, summarise
from sutazai.models import new_id

Label = Annotated[str, StringConstraints(max_length=200)]


def _written_out(value: Any) -> Any:
    """Read an instant in RFC 3339; pydantic takes numbers in text for seconds since 1970 too."""
    if isinstance(value, str) and value[4:5] == "-" and value[10:11] in "Tt ":
        with suppress(ValueError):
            return datetime.fromisoformat(value)
    if isinstance(value, str):
        raise ValueError("write the instant out, as 2026-01-31T12:00:00Z")
    return value


Instant = Annotated[
    AwareDatetime,
    BeforeValidator(_written_out),
    Field(ge=datetime(1970, 1, 1, tzinfo=UTC), lt=datetime(9000, 1, 1, tzinfo=UTC)),
]
"""An instant that both PostgreSQL and Python can hold in every time zone."""

IdempotencyKey = Annotated[
    str, StringConstraints(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")
]
"""1 to 255 visible ASCII characters."""

ConcurrencyKey = Annotated[str, StringConstraints(min_length=1, max_length=255)]

CallbackURL = Annotated[
    str, StringConstraints(min_length=8, max_length=2000, pattern=r"^https?://[^\s/?#]+")
]

LOCAL = "local"
"""The principal, who owns idempotency keys, while nobody has to say who they are."""

DEFAULT_PRIORITY = 5


class Options(BaseModel):
    """How a task is to be handled, whatever its action."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    priority: int = Field(
        default=DEFAULT_PRIORITY, ge=0, le=9, description="0 to 9; 9 is the most urgent."
    )
    run_at: Instant | None = Field(default=None, description="Not before this instant.")
    deadline_at: Instant | None = Field(
        default=None, description="Still queued at this instant, the task fails."
    )
    max_attempts: int | None = Field(
        default=None, ge=1, le=100, description="Failures allowed; default: the action's."
    )
    time_limit_s: float | None = Field(
        default=None,
        gt=0,
        le=86_400,
        description="Seconds an attempt may run; default: the action's.",
    )
    idempotency_key: IdempotencyKey | None = Field(
        default=None, description="The same key with the same request is the same task."
    )
    concurrency_key: ConcurrencyKey | None = Field(
        default=None,
        description="Of tasks with an equal key only as many run at once as the action allows.",
    )
    on_conflict: Literal["enqueue", "reject", "join", "replace"] = Field(
        default="enqueue",
        description="While a task with the same concurrency key has not ended: wait for its turn, "
        "be refused, stand for that task, or cancel it.",
    )
    callback_url: CallbackURL | None = Field(
        default=None, description="Where the ended task is posted to, signed."
    )
    labels: dict[Label, Label] = Field(
        default_factory=dict, max_length=20, description="Free words to find tasks by."
    )

    @property
    def resolves_conflict(self) -> bool:
        """Whether unfinished tasks of the same concurrency key matter when it is accepted."""
        return self.concurrency_key is not None and self.on_conflict != "enqueue"


NO_OPTIONS = Options()
"""What most tasks are handed over with: to make a model costs more than to read it."""


@dataclass(frozen=True)
class Submission:
    """One task to be accepted."""

    action: Action[Any, Any]
    params: Mapping[str, Any]
    options: Options = NO_OPTIONS
    source: str = "api"
    task_id: UUID = field(default_factory=new_id)
    parent_id: UUID | None = None
    call_index: int | None = None
    retry_of: UUID | None = None
    scheduled_by: str | None = None
    tick_at: datetime | None = None
    host: str | None = None
    deadline_in_s: float | None = None
    principal: str = LOCAL

    def __post_init__(self) -> None:
        """Validate the parameters; raises `InvalidInput`."""
        self.action.parse(self.params)

    @property
    def is_due(self) -> bool:
        """Whether it may run now, by this machine's clock (the database decides in the end)."""
        return self.options.run_at is None or self.options.run_at <= datetime.now(UTC)

    @property
    def row(self) -> dict[str, Any]:
        """The task's row, as `statements.accept` inserts it."""
        options = self.options
        row = {
            "task_id": self.task_id,
            "agent": self.action.agent,
            "action": self.action.name,
            "params": dict(self.params),
            "priority": options.priority,
            "max_attempts": options.max_attempts or self.action.max_attempts,
            "time_limit_s": options.time_limit_s or self.action.time_limit_s,
            "rerun_after_crash": self.action.rerun_after_crash,
            "source": self.source,
        }
        if options.idempotency_key is not None:
            row |= {"principal": self.principal, "fingerprint": self.fingerprint}
        optional = {
            "run_at": options.run_at,
            "deadline_at": options.deadline_at,
            "labels": options.labels or None,
            "idempotency_key": options.idempotency_key,
            "concurrency_key": options.concurrency_key,
            "callback_url": options.callback_url,
            "parent_id": self.parent_id,
            "call_index": self.call_index,
            "retry_of": self.retry_of,
            "scheduled_by": self.scheduled_by,
            "tick_at": self.tick_at,
            "host": self.host,
            "deadline_in_s": self.deadline_in_s,
        }
        return row | {name: value for name, value in optional.items() if value is not None}

    @property
    def fingerprint(self) -> str:
        """What was asked for, as a hash: the same idempotency key must ask for the same."""
        options = self.options
        asked = [
            *(self.action.full_name, dict(self.params), options.priority),
            options.run_at.astimezone(UTC).isoformat() if options.run_at else None,
        ]
        return hashlib.sha256(payload.dumps_sorted(asked)).hexdigest()

    @property
    def notice(self) -> Notice:
        """What the broker is told."""
        return Notice(
            task_id=self.task_id,
            agent=self.action.agent,
            action=self.action.name,
            priority=self.options.priority,
            host=self.host,
            time_limit_s=self.options.time_limit_s or self.action.time_limit_s,
            summary=summarise(payload.dumps(dict(self.params))),
            is_plain=self.host is None
            and self.options.concurrency_key is None
            and self.action.rerun_after_crash,
        )
