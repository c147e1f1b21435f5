"""Changing processes: their niceness, their cores, and stopping one that was named.

Only processes of our own user, and never those of this system: a process is of the system when it
is one of its workers, an ancestor of ours, or below such an ancestor that belongs to it.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from uuid import UUID

import psutil
from pydantic import BaseModel

from sutazai.agent import Context
from sutazai.errors import InvalidInput, SutazaiError
from sutazai.settings import settings
from sutazai.tasks.hardware_resource_optimizer.item import Gain, Kind, PlanItem
from sutazai.tasks.hardware_resource_optimizer.reading import Metrics, ProcessUsage

BUSY_PERCENT = 50.0
"""Of one core: a process that uses less is not worth being slowed."""

LARGE_PERCENT = 5.0
"""Of memory: a process that holds less is not worth being stopped."""

_GRACE_S = 10.0


class ProcessIdentity(BaseModel):
    """A process and its start time: pids are used again."""

    pid: int
    started_at: float
    name: str

    def find(self, context: Context) -> psutil.Process:
        """Return the process; raises `InvalidInput` when it may not be touched or has ended."""
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started_at) > 1:
                raise InvalidInput(f"The pid {self.pid} belongs to another process by now.")
            if process.uids().real != os.getuid():
                raise InvalidInput(f"{self.name} (pid {self.pid}) is another user's.")
        except psutil.NoSuchProcess:
            raise InvalidInput(f"{self.name} (pid {self.pid}) has ended.") from None
        if self.pid in system_pids(context):
            raise InvalidInput(f"{self.name} (pid {self.pid}) is a part of this system.")
        return process


class Renice:
    """Lets a busy process give way to others; it frees no CPU time, and the gain says so."""

    def propose(self, metrics: Metrics, context: Context, nice: int) -> list[PlanItem]:
        """Offer it for busy processes that are less nice."""
        return [
            _item(
                "renice",
                usage,
                {"cpu_percent": 0},
                reversible=_may_lower_nice(usage.nice),
                nice_before=usage.nice,
                nice_after=nice,
            )
            for usage in _touchable(metrics, context)
            if usage.cpu_percent >= BUSY_PERCENT and usage.nice < nice
        ]

    def prepare(self, item: PlanItem, context: Context, audit_id: UUID) -> dict[str, Any]:  # noqa: ARG002
        """Note the niceness as it is now."""
        process = _identity(item).find(context)
        return {**_identity(item).model_dump(), "nice": process.nice()}

    def carry_out(self, item: PlanItem, undo: dict[str, Any], context: Context) -> Gain:  # noqa: ARG002
        """Set the niceness."""
        _identity(item).find(context).nice(int(str(item.evidence["nice_after"])))
        return {}

    def undo(self, undo: dict[str, Any], context: Context) -> None:
        """Set the niceness from before; lowering it needs the right to."""
        try:
            ProcessIdentity.model_validate(undo).find(context).nice(undo["nice"])
        except psutil.AccessDenied:
            raise InvalidInput(
                f"Niceness of pid {undo['pid']} cannot be lowered to {undo['nice']} without "
                "CAP_SYS_NICE."
            ) from None


class SetAffinity:
    """Keeps a process that uses several cores off one of them."""

    def propose(self, metrics: Metrics, context: Context) -> list[PlanItem]:
        """Offer it for processes that could use every core and do use more than all but one."""
        items = []
        for usage in _touchable(metrics, context):
            cores = _affinity(usage.pid)
            left = len(cores) - 1
            if left >= 1 and usage.cpu_percent > 100 * left:
                gain = round((usage.cpu_percent - 100 * left) / metrics.cpu_count, 1)
                items.append(
                    _item(
                        "set_affinity",
                        usage,
                        {"cpu_percent": gain},
                        reversible=True,
                        cores_before=cores,
                        cores_after=cores[1:],
                    )
                )
        return items

    def prepare(self, item: PlanItem, context: Context, audit_id: UUID) -> dict[str, Any]:  # noqa: ARG002
        """Note the cores as they are now."""
        process = _identity(item).find(context)
        return {**_identity(item).model_dump(), "cores": process.cpu_affinity()}

    def carry_out(self, item: PlanItem, undo: dict[str, Any], context: Context) -> Gain:  # noqa: ARG002
        """Set the cores."""
        cores = item.evidence["cores_after"]
        if not isinstance(cores, list) or not cores:
            raise InvalidInput(f"The plan's item {item.id} names no cores.")
        _identity(item).find(context).cpu_affinity([int(str(core)) for core in cores])
        return {}

    def undo(self, undo: dict[str, Any], context: Context) -> None:
        """Set the cores from before."""
        ProcessIdentity.model_validate(undo).find(context).cpu_affinity(undo["cores"])


class StopProcess:
    """Ends a process that holds much memory: asks, and after 10 s forces. Never by itself."""

    def propose(self, metrics: Metrics, context: Context) -> list[PlanItem]:
        """Offer it for processes that hold much memory."""
        return [
            _item(
                "stop_process",
                usage,
                {"memory_bytes": usage.memory_bytes},
                reversible=False,
                memory_percent=usage.memory_percent,
            )
            for usage in _touchable(metrics, context)
            if usage.memory_percent >= LARGE_PERCENT
        ]

    def prepare(self, item: PlanItem, context: Context, audit_id: UUID) -> dict[str, Any]:  # noqa: ARG002
        """Check that it is still that process and not one of this system's."""
        _identity(item).find(context)
        return {}

    def carry_out(self, item: PlanItem, undo: dict[str, Any], context: Context) -> Gain:  # noqa: ARG002
        """Terminate, then kill; the gain is what it held until then and holds no more."""
        if not psutil.pid_exists(_identity(item).pid):
            return {"memory_bytes": 0}  # it has ended by itself
        process = _identity(item).find(context)
        held = process.memory_info().rss
        process.terminate()
        if not _has_ended(process, within_s=_GRACE_S):
            process.kill()
            if not _has_ended(process, within_s=_GRACE_S):
                return {"memory_bytes": 0}  # it hangs in the kernel, and ends when that lets go
        return {"memory_bytes": held}

    def undo(self, undo: dict[str, Any], context: Context) -> None:  # noqa: ARG002
        """Refuse: a stopped process is gone."""
        raise InvalidInput("A stopped process cannot be started again from here.")


def _has_ended(process: psutil.Process, *, within_s: float) -> bool:
    """Wait for a process to end; one whose parent has not asked for its status yet has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def system_pids(context: Context) -> set[int]:
    """Return the pids that belong to this system and must be left alone.

    These are pid 1, our own process with its ancestors (a terminal or an init system that would
    take us along), this host's workers with theirs, and all that runs below an ancestor or beside
    our data whose command line names this system: supervisor, fronts, servers.
    """
    pids = {1, os.getpid()}
    ancestors = psutil.Process().parents()
    with suppress(SutazaiError):
        for worker in context.system.workers():
            if worker.host == context.host:
                pids |= _with_descendants(worker.pid)
                with suppress(psutil.Error):
                    ancestors += psutil.Process(worker.pid).parents()
    for ancestor in set(ancestors):
        pids.add(ancestor.pid)
        if _names_system(_command(ancestor)):
            pids |= _with_descendants(ancestor.pid)
    home = str(settings().home)
    for process in psutil.process_iter(["cmdline"]):
        if any(home in part for part in process.info["cmdline"] or ()):
            pids.add(process.pid)
    return pids


def _with_descendants(pid: int) -> set[int]:
    with suppress(psutil.Error):
        return {pid} | {child.pid for child in psutil.Process(pid).children(recursive=True)}
    return {pid}


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def _names_system(command: list[str]) -> bool:
    """Whether a command line starts this system, rather than having its name in some path."""
    home = str(settings().home)
    return any(
        part == "sutazai" or part.endswith("/bin/sutazai") or home in part for part in command
    )


def _touchable(metrics: Metrics, context: Context) -> Iterable[ProcessUsage]:
    """Return the processes of a reading that are our user's and not the system's."""
    own = system_pids(context)
    for usage in metrics.top_processes:
        with suppress(psutil.Error):
            process = psutil.Process(usage.pid)
            # Kernel threads have no command line.
            if usage.pid not in own and process.uids().real == os.getuid() and process.cmdline():
                yield usage


def _item(
    kind: Kind, usage: ProcessUsage, gain: Gain, *, reversible: bool, **evidence: Any
) -> PlanItem:
    identity = ProcessIdentity(pid=usage.pid, started_at=usage.started_at, name=usage.name)
    return PlanItem(
        id=f"{kind}-{usage.pid}",
        kind=kind,
        target=f"{usage.name} (pid {usage.pid})",
        expected_gain=gain,
        risk="high" if kind == "stop_process" else "low",
        reversible=reversible,
        evidence={
            **identity.model_dump(),
            "cpu_percent": usage.cpu_percent,
            "memory_bytes": usage.memory_bytes,
            **evidence,
        },
    )


def _identity(item: PlanItem) -> ProcessIdentity:
    return ProcessIdentity.model_validate(item.evidence)


def _may_lower_nice(nice: int) -> bool:
    """Whether we may set this niceness again after having raised it."""
    if os.geteuid() == 0:
        return True
    limit = getattr(resource, "RLIMIT_NICE", None)
    return limit is not None and resource.getrlimit(limit)[0] >= 20 - nice


def _affinity(pid: int) -> list[int]:
    try:
        return list(psutil.Process(pid).cpu_affinity() or ())
    except (psutil.Error, AttributeError):
        return []  # it has ended, or this system has no affinity
