"""Worker pools: smaller under pressure, larger while work waits and there is room.

Pressure is what the kernel's stall figures say; utilisation counts where there are none, and as
the second sign. A pool is resized one step at a time, within its agent's bounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import UUID

import psutil
from pydantic import BaseModel

from sutazai.agent import Context, WorkerView
from sutazai.errors import InvalidInput, SutazaiError, Unsupported
from sutazai.tasks.hardware_resource_optimizer.item import Gain, Kind, PlanItem
from sutazai.tasks.hardware_resource_optimizer.reading import Metrics, Pressure

SLOT_BYTES = 100 << 20
"""What a slot is taken to need where none can be measured: a Python process with its imports."""


class Bounds(NamedTuple):
    """From where on a host is under pressure."""

    memory_percent: float = 90.0
    cpu_percent: float = 90.0
    stall_percent: float = 20.0


class Change(NamedTuple):
    """A worker, the slots it should have, and why."""

    worker: WorkerView
    slots: int
    reason: str


class PoolEvidence(BaseModel):
    """What an item says of a resize."""

    agent: str
    host: str
    slots_before: int
    slots_after: int
    reason: str


class ResizePool:
    """Sets the number of slots of an agent's worker on a host."""

    def propose(self, changes: Iterable[Change], context: Context) -> list[PlanItem]:
        """Offer these changes of slots."""
        return [_item(change, slot_bytes(change.worker, context.host)) for change in changes]

    def prepare(self, item: PlanItem, context: Context, audit_id: UUID) -> dict[str, Any]:  # noqa: ARG002
        """Check the agent's bounds, and note the slots as they are now."""
        change = PoolEvidence.model_validate(item.evidence)
        least, _, most = context.agents[change.agent].slots
        if not least <= change.slots_after <= most:
            raise InvalidInput(f"{change.agent} has between {least} and {most} slots.")
        now = next(
            (
                worker.slots
                for worker in context.system.workers()
                if (worker.agent, worker.host) == (change.agent, change.host)
            ),
            None,
        )
        if now is None:
            raise InvalidInput(f"{change.agent} has no live worker on {change.host}.")
        return {"agent": change.agent, "host": change.host, "slots": now}

    def carry_out(self, item: PlanItem, undo: dict[str, Any], context: Context) -> Gain:
        """Resize; the gain counts slots, what they free is measured for the run as a whole."""
        change = PoolEvidence.model_validate(item.evidence)
        reached = context.system.resize(change.agent, change.host, change.slots_after)
        return {"slots": reached - undo["slots"]}

    def undo(self, undo: dict[str, Any], context: Context) -> None:
        """Resize to the slots from before."""
        context.system.resize(undo["agent"], undo["host"], undo["slots"])


def workers_of(context: Context, host: str | None = None) -> list[WorkerView]:
    """Return the live workers, of one host or of all; none where the system cannot tell."""
    try:
        workers = context.system.workers()
    except SutazaiError:
        return []
    return [w for w in workers if (host is None or w.host == host) and w.agent in context.agents]


def memory_pressure(metrics: Metrics, bounds: Bounds) -> str | None:
    """Return what says that memory is short, or None."""
    return _stall("memory", metrics.psi.memory, bounds) or _above(
        "memory", metrics.memory_percent, bounds.memory_percent
    )


def cpu_pressure(metrics: Metrics, bounds: Bounds) -> str | None:
    """Return what says that CPU time is short, or None."""
    return _stall("CPU", metrics.psi.cpu, bounds) or _above(
        "CPU", metrics.cpu_percent, bounds.cpu_percent
    )


def shrinkable(context: Context, host: str, reason: str) -> list[Change]:
    """Return the workers of a host that can do with a slot less.

    Those with an idle slot; where every slot is busy, only the worker with most slots.
    """
    able = [w for w in workers_of(context, host) if w.slots > context.agents[w.agent].slots[0]]
    idle = [w for w in able if w.running < w.slots]
    chosen = idle or sorted(able, key=lambda w: -w.slots)[:1]
    return [Change(worker, worker.slots - 1, reason) for worker in chosen]


def growable(context: Context, metrics: Metrics, bounds: Bounds) -> list[Change]:
    """Return the workers of a host whose work waits, with the slots that it has room for.

    Room is what is left below the bounds: of memory in slots as large as the present ones, of CPU
    time in whole cores. The longest queue comes first.
    """
    room_bytes = metrics.memory_available - metrics.memory_total * (1 - bounds.memory_percent / 100)
    room_cores = int(metrics.cpu_count * (bounds.cpu_percent - metrics.cpu_percent) / 100)
    chosen = []
    for worker in sorted(workers_of(context, metrics.host), key=lambda w: -w.queued):
        most = context.agents[worker.agent].slots[2]
        if worker.queued == 0 or worker.running < worker.slots:
            continue
        size = slot_bytes(worker, context.host)
        extra = min(worker.queued, most - worker.slots, room_cores, int(room_bytes // size))
        if extra >= 1:
            room_bytes -= extra * size
            room_cores -= extra
            chosen.append(Change(worker, worker.slots + extra, f"{worker.queued} tasks wait"))
    return chosen


def slot_bytes(worker: WorkerView, here: str) -> int:
    """Return what one slot of a worker holds for itself alone, measured where it runs here."""
    sizes = []
    if worker.host == here:
        with suppress(psutil.Error):
            children = psutil.Process(worker.pid).children()
            sizes = [child.memory_full_info().uss for child in children]
    return max(1, sum(sizes) // len(sizes)) if sizes else SLOT_BYTES


def require_workers(context: Context) -> list[WorkerView]:
    """Return every live worker; raises `Unsupported` where there are none to tune."""
    workers = workers_of(context)
    if not workers:
        raise Unsupported("No live worker can be seen, so there is no pool to tune.")
    return workers


def _item(change: Change, size_bytes: int) -> PlanItem:
    worker, slots, reason = change
    kind: Kind = "shrink_pool" if slots < worker.slots else "grow_pool"
    evidence = PoolEvidence(
        agent=worker.agent,
        host=worker.host,
        slots_before=worker.slots,
        slots_after=slots,
        reason=reason,
    )
    return PlanItem(
        id=f"{kind}-{worker.agent}-{worker.host}",
        kind=kind,
        target=f"{worker.agent} on {worker.host}",
        expected_gain={
            "memory_bytes": (worker.slots - slots) * size_bytes,
            "slots": slots - worker.slots,
        },
        risk="low",
        reversible=True,
        evidence={**evidence.model_dump(), "running": worker.running, "queued": worker.queued},
    )


def _stall(name: str, pressure: Pressure | None, bounds: Bounds) -> str | None:
    if pressure is None or pressure.some is None or pressure.some.avg60 < bounds.stall_percent:
        return None
    return f"processes waited for {name} {pressure.some.avg60:.0f} % of the last minute"


def _above(name: str, percent: float, bound: float) -> str | None:
    return f"{name} is used to {percent:.0f} %" if percent >= bound else None
