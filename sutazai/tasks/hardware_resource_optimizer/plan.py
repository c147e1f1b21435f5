"""Making plans: what could be changed, by resource, with the measurements that speak for it.

A plan is stored. Unless it is a dry run, its reversible items are carried out at once; the others
wait until `apply` names them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from uuid import UUID, uuid4

from pydantic import AwareDatetime, BaseModel, Field

from sutazai import db
from sutazai.agent import Context
from sutazai.tasks.hardware_resource_optimizer import (
    advice,
    duplicate,
    pool,
    protection,
    remedy,
    sampling,
    tables,
)
from sutazai.tasks.hardware_resource_optimizer.advice import Suggestion
from sutazai.tasks.hardware_resource_optimizer.cgroup import ReclaimCgroup
from sutazai.tasks.hardware_resource_optimizer.duplicate import HardlinkDuplicate
from sutazai.tasks.hardware_resource_optimizer.engine import UnloadModel
from sutazai.tasks.hardware_resource_optimizer.item import Gain, PlanItem
from sutazai.tasks.hardware_resource_optimizer.pool import Bounds, ResizePool
from sutazai.tasks.hardware_resource_optimizer.process import Renice, SetAffinity, StopProcess
from sutazai.tasks.hardware_resource_optimizer.quarantine import QuarantineFile
from sutazai.tasks.hardware_resource_optimizer.reading import (
    DiskUsage,
    LoadAverage,
    Metrics,
    Psi,
    Swap,
)
from sutazai.tasks.hardware_resource_optimizer.remedy import AppliedItem
from sutazai.tasks.hardware_resource_optimizer.storage import (
    QUARANTINE_PREFIX,
    Budget,
    FileRecord,
    Walk,
)

MOST_ITEMS = 200
"""Of files in one plan, of each kind: a plan is read by people and stored as one row."""

MOST_FILES = 500_000
"""Files that one scan for a plan keeps in mind."""

_TEMPORARY = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - to be looked at, not written to
_FRESH_S = 5.0

PlanResource = Literal["memory", "cpu", "disk"]


class OptimizeParams(BaseModel):
    """What is too much, what may be done about it, and where."""

    threshold_percent: float = Field(
        default=80.0, ge=0, le=100, description="From this use on something is to be done."
    )
    dry_run: bool = Field(
        default=True, description="Only plan. False also carries out what is reversible."
    )
    paths: list[str] = Field(
        default=[],
        max_length=100,
        description="Folders in which files may be moved or linked. These are searched whatever "
        "the use of their disk; without any, the temporary folders from the threshold on.",
    )
    min_age_days: float = Field(
        default=30.0, ge=0, le=36_500, description="Files changed later than that are left alone."
    )
    max_bytes: int = Field(
        default=10 << 30, ge=0, description="The most to move, link or reclaim in one run."
    )
    nice: int = Field(default=10, ge=1, le=19, description="The niceness given to busy processes.")
    retention_days: float = Field(
        default=7.0, ge=0, le=3650, description="How long a file stays in quarantine."
    )
    budget_s: float = Field(
        default=60.0, gt=0, le=100, description="How long files are searched for."
    )


class TuneParams(BaseModel):
    """From where on hosts are under pressure."""

    dry_run: bool = Field(default=True, description="Only plan.")
    memory_percent: float = Field(default=90.0, ge=1, le=100, description="Memory is short there.")
    cpu_percent: float = Field(default=90.0, ge=1, le=100, description="CPU time is short there.")
    stall_percent: float = Field(
        default=20.0,
        gt=0,
        le=100,
        description="Or when processes stood still for this share of the last minute.",
    )


class Usage(BaseModel):
    """The figures that the plan goes by."""

    host: str
    timestamp: AwareDatetime
    cpu_percent: float
    cpu_count: int
    load: LoadAverage
    memory_total: int
    memory_available: int
    memory_percent: float
    swap: Swap
    disk_usage: dict[str, DiskUsage]
    psi: Psi


class Optimization(BaseModel):
    """A plan, and what of it was carried out."""

    plan_id: UUID = Field(description="To name it in `apply`.")
    dry_run: bool
    degraded: bool = Field(default=True, description="No language model took part.")
    source: Literal["rules"] = "rules"
    current_usage: Usage
    suggestions: list[Suggestion]
    plan: list[PlanItem]
    applied: list[AppliedItem] = Field(description="Empty in a dry run.")
    measured_gain: Gain | None = Field(
        description="The same figures before and after, by name; null in a dry run."
    )
    truncated: bool = Field(description="Whether there is more than the plan holds.")


class _Draft:
    """What a plan consists of while it is being made."""

    def __init__(self) -> None:
        self.items: list[PlanItem] = []
        self.suggestions: list[Suggestion] = []
        self.truncated = False


def optimize(
    resources: tuple[PlanResource, ...],
    params: OptimizeParams,
    context: Context,
) -> Optimization:
    """Plan for these resources and carry out what is reversible, unless it is a dry run."""
    roots = [protection.check(path) for path in params.paths]
    metrics = sampling.newest(context, max_age_s=_FRESH_S)
    draft = _Draft()
    for resource in resources:
        _PLANNERS[resource](draft, metrics, params, roots, context)
        draft.suggestions += advice.ADVISERS[resource](metrics, params.threshold_percent)
    return _conclude(draft, metrics, context, dry_run=params.dry_run, resources=resources)


def tune_pools(params: TuneParams, context: Context) -> Optimization:
    """Plan smaller pools on hosts under pressure, larger ones where work waits."""
    bounds = Bounds(params.memory_percent, params.cpu_percent, params.stall_percent)
    draft = _Draft()
    here = sampling.newest(context, max_age_s=_FRESH_S)
    for host in sorted({worker.host for worker in pool.require_workers(context)}):
        metrics = here if host == context.host else sampling.known(host)
        if metrics is None:
            draft.suggestions.append(_unknown_host(host))
            continue
        reason = pool.memory_pressure(metrics, bounds) or pool.cpu_pressure(metrics, bounds)
        changes = (
            pool.shrinkable(context, host, reason)
            if reason
            else pool.growable(context, metrics, bounds)
        )
        draft.items += ResizePool().propose(changes, context)
    return _conclude(draft, here, context, dry_run=params.dry_run)


def _conclude(
    draft: _Draft,
    metrics: Metrics,
    context: Context,
    *,
    dry_run: bool,
    resources: tuple[PlanResource, ...] | None = None,
) -> Optimization:
    """Store the plan, and carry out what is reversible unless it is a dry run."""
    plan_id = uuid4()
    items = [item.model_dump(mode="json") for item in draft.items]
    name = ",".join(resources) if resources else "pools"
    row = tables.insert_plan(plan_id, context.host, name, items)
    applied: list[AppliedItem] = []
    gain: Gain | None = None
    if dry_run:
        context.write(row)
    else:
        # Committed first: audit rows name the plan, also those of a run that is cut short.
        with db.transaction() as connection:
            connection.execute(row)
        reversible = [item for item in draft.items if item.reversible]
        applied, gain = remedy.carry_out(plan_id, reversible, context, resources)
        draft.suggestions += _of_quarantined(applied)
    usage = {name: getattr(metrics, name) for name in Usage.model_fields}
    return Optimization(
        plan_id=plan_id,
        dry_run=dry_run,
        current_usage=Usage(**usage),
        suggestions=draft.suggestions,
        plan=draft.items,
        applied=applied,
        measured_gain=gain,
        truncated=draft.truncated,
    )


def _plan_memory(
    draft: _Draft, metrics: Metrics, params: OptimizeParams, _roots: list[Path], context: Context
) -> None:
    reason = pool.memory_pressure(metrics, Bounds(memory_percent=params.threshold_percent))
    if reason is None:
        draft.suggestions.append(_enough("memory", metrics.memory_percent, params, metrics))
        return
    draft.items += ReclaimCgroup().propose(sampling.meter.sources, params.max_bytes)
    draft.items += UnloadModel().propose()
    draft.items += ResizePool().propose(pool.shrinkable(context, context.host, reason), context)
    draft.items += StopProcess().propose(metrics, context)


def _plan_cpu(
    draft: _Draft, metrics: Metrics, params: OptimizeParams, _roots: list[Path], context: Context
) -> None:
    reason = pool.cpu_pressure(metrics, Bounds(cpu_percent=params.threshold_percent))
    if reason is None:
        draft.suggestions.append(_enough("CPU", metrics.cpu_percent, params, metrics))
        return
    draft.items += Renice().propose(metrics, context, params.nice)
    draft.items += SetAffinity().propose(metrics, context)
    taken = {item.id for item in draft.items}
    changes = pool.shrinkable(context, context.host, reason)
    draft.items += [i for i in ResizePool().propose(changes, context) if i.id not in taken]


def _plan_disk(
    draft: _Draft, metrics: Metrics, params: OptimizeParams, roots: list[Path], context: Context
) -> None:
    full = max((usage.percent for usage in metrics.disk_usage.values()), default=0.0)
    if not roots and full < params.threshold_percent:
        draft.suggestions.append(_enough("the fullest disk", full, params, metrics))
        return
    searched = roots or [path for path in _TEMPORARY if path.is_dir() and not path.is_symlink()]
    budget = Budget(params.budget_s, context)
    records, spared = _find_files(searched, params, budget)
    groups = duplicate.Finder(budget).find(records)
    links = HardlinkDuplicate().propose(groups, MOST_ITEMS, params.max_bytes)
    linked = {item.target for item in links} | {
        str(file["path"]) for item in links if isinstance(file := item.evidence["keep"], dict)
    }
    moves = QuarantineFile().propose(
        (record for record in records if record.path not in linked),
        min_age_days=params.min_age_days,
        retention_days=params.retention_days,
        limit=MOST_ITEMS,
        max_bytes=params.max_bytes - sum(int(item.expected_gain["disk_bytes"]) for item in links),
    )
    draft.items += [*links, *moves]
    draft.truncated = budget.truncated or MOST_ITEMS in (len(links), len(moves))
    draft.suggestions.append(_of_search(searched, len(records), spared, len(links), len(moves)))


def _find_files(
    roots: list[Path], params: OptimizeParams, budget: Budget
) -> tuple[list[FileRecord], int]:
    """Return the files that may be changed, and how many were spared because they are open."""
    protected = protection.protected_roots()
    in_use = open_files()
    now_s = time.time()
    found: dict[tuple[int, int], FileRecord] = {}
    spared = 0
    for root in roots:
        for record in Walk(root, budget, skipped=protected, skipped_prefix=QUARANTINE_PREFIX):
            if len(found) == MOST_FILES:
                budget.truncated = True
                break
            key = (record.device, record.inode)
            if key in in_use:
                spared += 1
            elif (
                record.size_bytes
                and record.is_printable
                and record.age_days(now_s) >= params.min_age_days
            ):
                found[key] = record
    return list(found.values()), spared


def open_files() -> set[tuple[int, int]]:
    """Return (device, inode) of every file that some process has open, as far as we may look.

    A file in use is left alone: its writer would go on writing into it, and its blocks would stay
    taken. Where there is no /proc, none is known.
    """
    found = set()
    try:
        processes = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    except OSError:
        return set()
    for process in processes:
        try:
            with os.scandir(process / "fd") as descriptors:
                for descriptor in descriptors:
                    state = descriptor.stat()
                    found.add((state.st_dev, state.st_ino))
        except OSError:
            continue  # it has ended, or is another user's
    return found


_PLANNERS: dict[str, Callable[[_Draft, Metrics, OptimizeParams, list[Path], Context], None]] = {
    "memory": _plan_memory,
    "cpu": _plan_cpu,
    "disk": _plan_disk,
}


def _enough(name: str, percent: float, params: OptimizeParams, metrics: Metrics) -> Suggestion:
    return Suggestion(
        rule="below_threshold",
        severity="info",
        message=(
            f"Nothing is planned: {name} is used to {percent} %, below the threshold of "
            f"{params.threshold_percent} %."
        ),
        evidence={"percent": percent, "at": metrics.timestamp.isoformat()},
    )


def _of_search(searched: list[Path], files: int, spared: int, links: int, moves: int) -> Suggestion:
    return Suggestion(
        rule="searched",
        severity="info",
        message=(
            f"Of {files} files that are old enough, {links} are copies that can share an inode, "
            f"which frees their blocks at once; {moves} can go into quarantine, which frees "
            "nothing until they are purged."
        ),
        evidence={
            "paths": [str(path) for path in searched],
            "files": files,
            "spared_because_open": spared,
        },
    )


def _of_quarantined(applied: list[AppliedItem]) -> list[Suggestion]:
    """Say what will free the space of files that were only moved."""
    moved = [
        item for item in applied if item.kind == "quarantine_file" and item.outcome == "applied"
    ]
    if not moved:
        return []
    held = sum(int(item.gain["quarantined_bytes"]) for item in moved)
    return [
        Suggestion(
            rule="quarantined",
            severity="info",
            message=(
                f"{len(moved)} files with {held} bytes lie in quarantine on their own file system "
                "and still take up their space. purge_quarantine deletes them when their "
                "retention ends, or at once when their audit_ids are named."
            ),
            evidence={"bytes": held, "audit_ids": [str(item.audit_id) for item in moved]},
        )
    ]


def _unknown_host(host: str) -> Suggestion:
    return Suggestion(
        rule="no_sample",
        severity="warning",
        message=f"{host} has no recent sample, so its pools are left as they are.",
        evidence={"host": host},
    )
