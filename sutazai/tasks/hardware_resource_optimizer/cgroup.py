"""Control groups (version 2) and pressure stall information, read from their files.

Inside a container psutil reports the whole machine; what the processes here may use stands in the
files of their control group. On hosts with version 1 nothing is said of limits. Both roots are
parameters, so that a test can point to a made-up tree.
https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/accounting/psi.html
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sutazai.agent import Context
from sutazai.errors import InvalidInput
from sutazai.tasks.hardware_resource_optimizer.item import Gain, PlanItem
from sutazai.tasks.hardware_resource_optimizer.reading import Pressure, Psi, Stall

_RESOURCES = ("cpu", "memory", "io")


@dataclass(frozen=True)
class Sources:
    """Where the kernel's files are."""

    cgroup: Path = Path("/sys/fs/cgroup")
    proc: Path = Path("/proc")


class Limits(NamedTuple):
    """What the control group allows and uses; None where it says nothing."""

    memory_max: int | None = None
    memory_current: int | None = None
    memory_reclaimable: int = 0
    cpu_quota_cores: float | None = None
    cpuset_cores: int | None = None
    cpu_used_s: float | None = None

    @property
    def is_limited(self) -> bool:
        """Whether memory or CPU time is limited below the machine's."""
        return self.memory_max is not None or self.cpu_quota_cores is not None


def folder(sources: Sources) -> Path | None:
    """Return the folder of this process's own group, or None without version 2."""
    root = next(
        (
            candidate
            for candidate in (sources.cgroup, sources.cgroup / "unified")
            if (candidate / "cgroup.controllers").exists() or (candidate / "memory.max").exists()
        ),
        None,
    )
    if root is None:
        return None
    for line in _read(sources.proc / "self" / "cgroup").splitlines():
        if line.startswith("0::/"):
            own = root / line.removeprefix("0::/")
            # ".." stands for a group outside of this namespace, which cannot be seen from here.
            return own if ".." not in own.parts and own.is_dir() else root
    return root


def read_limits(sources: Sources) -> Limits:
    """Return the tightest limits of the own group and those around it, with their usage."""
    own = folder(sources)
    if own is None:
        return Limits()
    levels = list(_levels(own, sources.cgroup))
    memory = min(
        ((limit, level) for level in levels if (limit := _number(level / "memory.max"))),
        default=(None, own),
        key=lambda pair: pair[0],
    )
    quota = min(
        ((cores, level) for level in levels if (cores := _quota(level))),
        default=(None, own),
        key=lambda pair: pair[0],
    )
    used_us = _fields(quota[1] / "cpu.stat").get("usage_usec")
    return Limits(
        memory_max=memory[0],
        memory_current=_number(memory[1] / "memory.current"),
        memory_reclaimable=_fields(memory[1] / "memory.stat").get("inactive_file", 0),
        cpu_quota_cores=quota[0],
        cpuset_cores=_cpuset_size(_read(own / "cpuset.cpus.effective")),
        cpu_used_s=used_us / 1e6 if used_us is not None else None,
    )


def read_psi(sources: Sources, limits: Limits) -> Psi:
    """Return the pressure of the own group where it is limited, else that of the machine."""
    own = folder(sources) if limits.is_limited else None
    found: dict[str, Pressure | None] = {}
    for resource in _RESOURCES:
        text = _read(own / f"{resource}.pressure") if own else ""
        found[resource] = parse_pressure(text or _read(sources.proc / "pressure" / resource))
    return Psi(**found)


def parse_pressure(text: str) -> Pressure | None:
    """Parse `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` and the line `full …`."""
    stalls = {}
    for line in filter(str.strip, text.splitlines()):
        kind, *pairs = line.split()
        values = dict(pair.split("=", 1) for pair in pairs)
        stalls[kind] = Stall(
            avg10=float(values["avg10"]),
            avg60=float(values["avg60"]),
            avg300=float(values["avg300"]),
            total_us=int(values["total"]),
        )
    return Pressure(some=stalls.get("some"), full=stalls.get("full")) if stalls else None


class ReclaimCgroup:
    """Asks the kernel to give back page cache of the own group; it is read again on demand."""

    def propose(self, sources: Sources, max_bytes: int) -> list[PlanItem]:
        """Offer it where the group's `memory.reclaim` is writable and there is cache to give."""
        own = folder(sources)
        if own is None or not os.access(own / "memory.reclaim", os.W_OK):
            return []
        reclaimable = min(_fields(own / "memory.stat").get("inactive_file", 0), max_bytes)
        if not reclaimable:
            return []
        return [
            PlanItem(
                id="reclaim_cgroup-1",
                kind="reclaim_cgroup",
                target=str(own),
                expected_gain={"memory_bytes": reclaimable},
                risk="low",
                reversible=True,
                evidence={"inactive_file_bytes": reclaimable},
            )
        ]

    def prepare(self, item: PlanItem, context: Context, audit_id: object) -> dict[str, Any]:  # noqa: ARG002
        """Refuse what is not the control file of a group."""
        if not (Path(item.target) / "memory.reclaim").is_file():
            raise InvalidInput(f"{item.target} has no memory.reclaim.")
        return {"nothing": "the kernel reads the pages again when they are needed"}

    def carry_out(self, item: PlanItem, undo: dict[str, Any], context: Context) -> Gain:  # noqa: ARG002
        """Reclaim, and return by how much the group's own figure fell."""
        own = Path(item.target)
        before = _number(own / "memory.current") or 0
        try:
            (own / "memory.reclaim").write_text(str(item.evidence["inactive_file_bytes"]))
        except OSError as error:
            # EAGAIN: less than was asked for could be reclaimed; what was, counts.
            if error.errno != errno.EAGAIN:
                raise
        return {"memory_bytes": before - (_number(own / "memory.current") or 0)}

    def undo(self, undo: dict[str, Any], context: Context) -> None:
        """Do nothing: the kernel reads the pages again when they are needed."""


def _levels(own: Path, root: Path) -> Iterator[Path]:
    """Yield a group and those around it: a limit anywhere above holds as well."""
    while True:
        yield own
        if own == root or root not in own.parents:
            return
        own = own.parent


def _read(path: Path) -> str:
    # EOPNOTSUPP is what a pressure file answers when the kernel was started with psi=0.
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _quota(level: Path) -> float | None:
    """Read `cpu.max`: `max 100000`, or microseconds of CPU time and of the period."""
    match _read(level / "cpu.max").split():
        case [quota, period] if quota.isdigit() and int(period):
            return int(quota) / int(period)
    return None


def _cpuset_size(text: str) -> int | None:
    """Count the cores of a list such as `0-3,8`."""
    size = 0
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        size += int(last or first) - int(first) + 1
    return size or None
