"""Carrying plans out and back, with an audit row for each item.

The row is committed before anything is changed, with what undoing needs. After a crash the same
task goes on with the row it began; everybody else is refused.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import psutil
from pydantic import BaseModel, Field, TypeAdapter

from sutazai import db
from sutazai.agent import Context
from sutazai.errors import InvalidInput, SutazaiError
from sutazai.tasks.hardware_resource_optimizer import quarantine, tables
from sutazai.tasks.hardware_resource_optimizer.cgroup import ReclaimCgroup
from sutazai.tasks.hardware_resource_optimizer.duplicate import HardlinkDuplicate
from sutazai.tasks.hardware_resource_optimizer.engine import UnloadModel
from sutazai.tasks.hardware_resource_optimizer.item import Gain, Kind, PlanItem, Remedy
from sutazai.tasks.hardware_resource_optimizer.pool import ResizePool
from sutazai.tasks.hardware_resource_optimizer.process import Renice, SetAffinity, StopProcess
from sutazai.tasks.hardware_resource_optimizer.quarantine import QuarantineFile
from sutazai.tasks.hardware_resource_optimizer.sampling import meter

REMEDIES: dict[Kind, Remedy] = {
    "shrink_pool": ResizePool(),
    "grow_pool": ResizePool(),
    "unload_model": UnloadModel(),
    "reclaim_cgroup": ReclaimCgroup(),
    "stop_process": StopProcess(),
    "renice": Renice(),
    "set_affinity": SetAffinity(),
    "quarantine_file": QuarantineFile(),
    "hardlink_duplicate": HardlinkDuplicate(),
}

LONGEST_S = 480.0
"""Items that are not begun by then are left for another call, within the action's time limit."""

_FIGURES = {"memory": "memory_bytes", "cpu": "cpu_percent", "disk": "disk_bytes"}

_FREES: dict[Kind, frozenset[str]] = {
    "shrink_pool": frozenset({"memory", "cpu"}),
    "grow_pool": frozenset(),
    "unload_model": frozenset({"memory"}),
    "reclaim_cgroup": frozenset({"memory"}),
    "stop_process": frozenset({"memory"}),
    "renice": frozenset({"cpu"}),
    "set_affinity": frozenset({"cpu"}),
    "quarantine_file": frozenset({"disk"}),
    "hardlink_duplicate": frozenset({"disk"}),
}

_SETTLING_S = 1.0
_items = TypeAdapter(list[PlanItem])


class ApplyParams(BaseModel):
    """Which items of which plan to carry out."""

    plan_id: UUID = Field(description="From the result of an `optimize_*` action.")
    item_ids: list[str] = Field(
        min_length=1, max_length=1000, description="The ids of its items, in the order to go."
    )


class RollbackParams(BaseModel):
    """What to undo."""

    audit_id: UUID = Field(description="From `applied` in the result of what was done.")


class PurgeParams(BaseModel):
    """Which quarantined files to delete for good."""

    audit_ids: list[UUID] | None = Field(
        default=None,
        max_length=1000,
        description="These, at once; by default those whose retention has ended.",
    )
    dry_run: bool = Field(
        default=False,
        description="Only tell what would go. Off by default: what it deletes without being told "
        "was given its date when it was quarantined.",
    )


class AppliedItem(BaseModel):
    """How one item ended."""

    item_id: str
    kind: Kind
    target: str
    outcome: Literal["applied", "refused", "failed", "skipped"]
    audit_id: UUID | None = Field(description="To name it in `rollback`.")
    gain: Gain = Field(description="Measured, as the same figure before and after.")
    message: str = ""


class ApplyResult(BaseModel):
    """How the named items ended, and what they brought together."""

    plan_id: UUID
    applied: list[AppliedItem]
    measured_gain: Gain


class RollbackResult(BaseModel):
    """What was undone."""

    audit_id: UUID = Field(description="The audit row of the rollback.")
    reverses: UUID
    kind: str
    target: str


class PurgedFile(BaseModel):
    """A quarantined file that was, or would be, deleted."""

    audit_id: UUID
    path: str = Field(description="Where it came from.")
    freed_bytes: int


class PurgeResult(BaseModel):
    """What left the quarantine for good."""

    dry_run: bool
    purged: list[PurgedFile]
    measured_gain: Gain


def apply(params: ApplyParams, context: Context) -> ApplyResult:
    """Carry out the named items of a stored plan."""
    with db.transaction() as connection:
        plan = connection.execute(tables.find_plan(params.plan_id)).first()
    if plan is None:
        raise InvalidInput(f"There is no plan {params.plan_id}; plans are kept for 30 days.")
    if plan.host != context.host:
        raise InvalidInput(
            f"The plan {params.plan_id} is for the host {plan.host}, and this task runs on "
            f"{context.host}."
        )
    known = {item.id: item for item in _items.validate_python(plan.items)}
    if unknown := [name for name in params.item_ids if name not in known]:
        raise InvalidInput(
            f"The plan has no item {', '.join(unknown)}; it has: {', '.join(known) or 'none'}."
        )
    chosen = [known[name] for name in dict.fromkeys(params.item_ids)]
    applied, gain = carry_out(params.plan_id, chosen, context)
    return ApplyResult(plan_id=params.plan_id, applied=applied, measured_gain=gain)


def carry_out(
    plan_id: UUID,
    items: Sequence[PlanItem],
    context: Context,
    resources: Collection[str] | None = None,
) -> tuple[list[AppliedItem], Gain]:
    """Carry items out one after another; return how each ended and the gain of all.

    The gain is told of these resources, by default of those that the kinds are meant for. Memory
    and CPU time are measured for the machine as a whole, before the first and after the last; of
    the disk each item measures what it freed itself, because others write meanwhile.
    """
    if resources is None:
        resources = {resource for item in items for resource in _FREES[item.kind]}
    before = _room(resources) if items else {}
    ends_at = time.monotonic() + LONGEST_S
    applied = []
    for number, item in enumerate(items):
        if context.cancelled or time.monotonic() > ends_at:
            applied.append(_ended(item, "skipped", None, {}, "There was no time left for it."))
            continue
        context.progress(number / len(items), f"{item.kind} {item.target}"[:200])
        applied.append(_carry_out_one(plan_id, item, context))
    after = before
    if before and any(ended.outcome == "applied" for ended in applied):
        time.sleep(_SETTLING_S)  # a process that was told to end takes a moment
        after = _room(resources)
    gain: Gain = {_FIGURES[resource]: 0 for resource in resources}
    gain |= {name: round(after[name] - value, 1) for name, value in before.items()}
    if "disk" in resources:
        gain |= _sum_of_disk(applied)
    return applied, gain


def _room(resources: Collection[str]) -> Gain:
    """Return what the machine has left of these resources."""
    room: Gain = {}
    if "memory" in resources:
        room[_FIGURES["memory"]] = meter.read_memory().available
    if "cpu" in resources:
        room[_FIGURES["cpu"]] = 100 - meter.read_cpu_percent()
    return room


def _sum_of_disk(applied: Sequence[AppliedItem]) -> Gain:
    sums: Counter[str] = Counter()
    for ended in applied:
        sums.update({name: int(value) for name, value in ended.gain.items()})
    moved = {"quarantined_bytes": sums["quarantined_bytes"]} if "quarantined_bytes" in sums else {}
    return {"disk_bytes": sums["disk_bytes"], **moved}


def _carry_out_one(plan_id: UUID, item: PlanItem, context: Context) -> AppliedItem:
    remedy = REMEDIES[item.kind]
    try:
        audit_id, undo = _begin(plan_id, item, remedy, context)
    except InvalidInput as error:
        return _refuse(plan_id, item, str(error), context)
    except (SutazaiError, OSError, psutil.Error) as error:
        return _ended(item, "failed", None, {}, _sentence(error))
    try:
        gain = remedy.carry_out(item, undo, context)
    except (SutazaiError, OSError, psutil.Error) as error:
        outcome: Literal["refused", "failed"] = (
            "refused" if isinstance(error, InvalidInput) else "failed"
        )
        _end(audit_id, outcome, {}, _sentence(error))
        return _ended(item, outcome, audit_id, {}, _sentence(error))
    _end(audit_id, "applied", gain)
    context.log.info("applied", kind=item.kind, target=item.target, audit_id=str(audit_id))
    return _ended(item, "applied", audit_id, gain)


def _begin(
    plan_id: UUID, item: PlanItem, remedy: Remedy, context: Context
) -> tuple[UUID, dict[str, Any]]:
    """Commit the audit row with the way back; or find the one that this task began."""
    with db.transaction() as connection:
        begun = connection.execute(tables.find_begun(plan_id, item.id)).first()
    if begun is None:
        audit_id = uuid4()
        undo = remedy.prepare(item, context, audit_id)
        row = {**_row(plan_id, item, context), "id": audit_id, "undo": undo}
        with db.transaction() as connection:
            if connection.execute(tables.begin(row)).first():
                return audit_id, undo
            begun = connection.execute(tables.find_begun(plan_id, item.id)).one()
    if begun.outcome == "started" and begun.task_id == context.task_id:
        return begun.id, dict(begun.undo)
    raise InvalidInput(f"{item.id} is carried out already, see the audit row {begun.id}.")


def _refuse(plan_id: UUID, item: PlanItem, message: str, context: Context) -> AppliedItem:
    audit_id = uuid4()
    row = {
        **_row(plan_id, item, context),
        "id": audit_id,
        "undo": {},
        "outcome": "refused",
        "message": message,
    }
    with db.transaction() as connection:
        connection.execute(tables.insert_audit(row))
    return _ended(item, "refused", audit_id, {}, message)


def _row(plan_id: UUID, item: PlanItem, context: Context) -> dict[str, Any]:
    return {
        "task_id": context.task_id,
        "host": context.host,
        "plan_id": plan_id,
        "item_id": item.id,
        "kind": item.kind,
        "target": item.target,
    }


def _end(audit_id: UUID, outcome: str, gain: Gain, message: str = "") -> None:
    with db.transaction() as connection:
        connection.execute(tables.end(audit_id, outcome, gain=gain, message=message))


def _ended(
    item: PlanItem,
    outcome: Literal["applied", "refused", "failed", "skipped"],
    audit_id: UUID | None,
    gain: Gain,
    message: str = "",
) -> AppliedItem:
    return AppliedItem(
        item_id=item.id,
        kind=item.kind,
        target=item.target,
        outcome=outcome,
        audit_id=audit_id,
        gain=gain,
        message=message,
    )


def _sentence(error: BaseException) -> str:
    return str(error) or type(error).__name__


def rollback(params: RollbackParams, context: Context) -> RollbackResult:
    """Undo what an audit row records; the undoing leaves a row of its own."""
    row = _find(params.audit_id, context)
    if row.outcome == "rolled_back":
        raise InvalidInput(f"{params.audit_id} has been rolled back already.")
    if row.outcome == "purged":
        raise InvalidInput(f"{row.target} has been deleted for good; it cannot be restored.")
    if row.outcome not in ("applied", "started") or row.reverses or not row.undo:
        raise InvalidInput(f"{params.audit_id} ({row.kind}, {row.outcome}) cannot be undone.")
    REMEDIES[row.kind].undo(dict(row.undo), context)
    audit_id = uuid4()
    record = {
        "id": audit_id,
        "task_id": context.task_id,
        "host": context.host,
        "kind": row.kind,
        "target": row.target,
        "outcome": "applied",
        "undo": {},
        "reverses": params.audit_id,
    }
    with db.transaction() as connection:
        connection.execute(tables.end(params.audit_id, "rolled_back"))
        connection.execute(tables.insert_audit(record))
    return RollbackResult(
        audit_id=audit_id, reverses=params.audit_id, kind=row.kind, target=row.target
    )


def _find(audit_id: UUID, context: Context) -> Any:
    with db.transaction() as connection:
        row = connection.execute(tables.find_audit(audit_id)).first()
    if row is None:
        raise InvalidInput(f"There is no audit row {audit_id}.")
    if row.host != context.host:
        raise InvalidInput(
            f"{audit_id} was done on the host {row.host}, and this task runs on {context.host}."
        )
    return row


def purge(params: PurgeParams, context: Context) -> PurgeResult:
    """Delete quarantined files for good."""
    with db.transaction() as connection:
        rows = connection.execute(tables.quarantined(context.host, params.audit_ids)).all()
    if unknown := set(params.audit_ids or ()) - {row.id for row in rows}:
        raise InvalidInput(
            f"No file of this host lies in quarantine under {', '.join(map(str, unknown))}."
        )
    purged = []
    for number, row in enumerate(rows):
        if context.cancelled:
            break
        context.progress(number / len(rows), row.target[:200])
        entry = Path(row.undo["entry"])
        freed = quarantine.held_bytes(entry) if params.dry_run else quarantine.purge(entry)
        purged.append(PurgedFile(audit_id=row.id, path=row.target, freed_bytes=freed))
        if not params.dry_run:
            _end(row.id, "purged", {"disk_bytes": freed})
    total = 0 if params.dry_run else sum(file.freed_bytes for file in purged)
    return PurgeResult(dry_run=params.dry_run, purged=purged, measured_gain={"disk_bytes": total})
