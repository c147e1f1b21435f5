"""One item of a plan, and what every kind of item can do."""

from __future__ import annotations

from typing import Any, Literal, Protocol
from uuid import UUID

from pydantic import BaseModel, Field, JsonValue

from sutazai.agent import Context

Kind = Literal[
    "shrink_pool",
    "grow_pool",
    "unload_model",
    "reclaim_cgroup",
    "stop_process",
    "renice",
    "set_affinity",
    "quarantine_file",
    "hardlink_duplicate",
]

Gain = dict[str, int | float]
"""Figures with their unit in the name, as `disk_bytes`; what is better is positive."""


class PlanItem(BaseModel):
    """One change that would help."""

    id: str = Field(description="To name it in `apply`; unique within its plan.")
    kind: Kind
    target: str = Field(description="The file, process, pool, model or group it changes.")
    expected_gain: Gain = Field(description="What it should bring, by figure.")
    risk: Literal["low", "medium", "high"]
    reversible: bool = Field(
        description="Whether `rollback` undoes it. Only such items are applied without being named."
    )
    evidence: dict[str, JsonValue] = Field(description="The measurements that led to it.")


class Remedy(Protocol):
    """How one kind of item is carried out and undone. Each step may be repeated after a crash."""

    def prepare(self, item: PlanItem, context: Context, audit_id: UUID) -> dict[str, Any]:
        """Check the target as it is now and return what `undo` will need.

        Raises `InvalidInput` when it must not be done.
        """

    def carry_out(self, item: PlanItem, undo: dict[str, Any], context: Context) -> Gain:
        """Do it and return the measured gain."""

    def undo(self, undo: dict[str, Any], context: Context) -> None:
        """Restore the state before; raises `InvalidInput` when that is no longer possible."""
