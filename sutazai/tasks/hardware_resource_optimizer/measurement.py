"""Taking one reading of this host.

A share of CPU time is a difference of counters over an interval. A `Meter` keeps the counters of
its last reading; where that is missing or too old, it counts twice, 0.1 s apart.
"""

from __future__ import annotations

import math
import pwd
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple

import psutil

from sutazai.tasks.hardware_resource_optimizer import cgroup, gpu
from sutazai.tasks.hardware_resource_optimizer.cgroup import Limits, Sources
from sutazai.tasks.hardware_resource_optimizer.reading import (
    CgroupLimits,
    DiskIO,
    DiskUsage,
    LoadAverage,
    Metrics,
    NetworkIO,
    ProcessUsage,
    Swap,
)

SHORTEST_INTERVAL_S = 0.1
"""The kernel counts CPU time in steps of 10 ms, so a shorter interval says nothing."""

LONGEST_INTERVAL_S = 120.0
"""Counters older than this say nothing of the present."""

TOP = 6
"""How many processes are named by memory, and how many by CPU time."""

_READ_ONLY_IMAGES = frozenset({"squashfs", "iso9660", "erofs"})
"""File systems that are always full."""

ProcessKey = tuple[int, float]
"""A pid and its start time: pids are used again."""


class ProcessCount(NamedTuple):
    """What one process has used and holds."""

    process: psutil.Process
    cpu_s: float
    memory_bytes: int


class Counters(NamedTuple):
    """Everything that only grows, at one instant."""

    at: float
    cpu_busy_s: float
    cpu_total_s: float
    cgroup_cpu_s: float | None
    network: NetworkIO
    disk: DiskIO
    processes: dict[ProcessKey, ProcessCount]


class Memory(NamedTuple):
    """Memory that this host, or the container around this process, has."""

    total: int
    available: int

    @property
    def percent(self) -> float:
        """The share that is not available."""
        return round(100 * (self.total - self.available) / self.total, 1) if self.total else 0.0


class Meter:
    """Takes readings and keeps the counters of the last one; one a process."""

    def __init__(
        self,
        sources: Sources = Sources(),  # noqa: B008 - it is immutable
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.sources = sources
        self._clock = clock
        self._wait = wait
        self._last: Counters | None = None
        # Threads of the kernel hold no memory. Nothing can be done about them, and there are
        # many, so they are looked at once.
        self._kernel: set[ProcessKey] = set()

    def read(self, host: str) -> Metrics:
        """Return a reading of this host."""
        before = self._counters_before()
        limits = cgroup.read_limits(self.sources)
        now = self._count(limits)
        self._last = now
        memory = measure_memory(limits)
        cores = _usable_cores(limits)
        swap = psutil.swap_memory()
        load = psutil.getloadavg()
        return Metrics(
            host=host,
            timestamp=datetime.now(UTC),
            cpu_percent=_cpu_percent(before, now, cores),
            cpu_count=max(1, math.ceil(cores)),
            load=LoadAverage(avg1=load[0], avg5=load[1], avg15=load[2]),
            memory_total=memory.total,
            memory_available=memory.available,
            memory_percent=memory.percent,
            swap=Swap(total=swap.total, used=swap.used, free=swap.free, percent=swap.percent),
            disk_usage=read_disks(),
            network_io=_with_network_rates(before, now),
            disk_io=_with_disk_rates(before, now),
            psi=cgroup.read_psi(self.sources, limits),
            cgroup=CgroupLimits(
                memory_max=limits.memory_max,
                memory_current=limits.memory_current,
                cpu_quota_cores=limits.cpu_quota_cores,
            ),
            top_processes=_top_processes(before, now, memory.total),
            gpus=gpu.read(),
        )

    def read_memory(self) -> Memory:
        """Return memory alone, which costs less than a reading."""
        return measure_memory(cgroup.read_limits(self.sources))

    def read_cpu_percent(self, interval_s: float = 0.5) -> float:
        """Return the busy share of all usable cores over an interval from now on."""
        limits = cgroup.read_limits(self.sources)
        before = self._count(limits, processes=False)
        self._wait(interval_s)
        limits = cgroup.read_limits(self.sources)
        after = self._count(limits, processes=False)
        return _cpu_percent(before, after, _usable_cores(limits))

    def _counters_before(self) -> Counters:
        """Return counters that are old enough to compare with, waiting for that if need be."""
        now = self._clock()
        if self._last is None or now - self._last.at > LONGEST_INTERVAL_S:
            self._last = self._count(cgroup.read_limits(self.sources))
        missing_s = SHORTEST_INTERVAL_S - (self._clock() - self._last.at)
        if missing_s > 0:
            self._wait(missing_s)
        return self._last

    def _count(self, limits: Limits, *, processes: bool = True) -> Counters:
        times = psutil.cpu_times()
        # Linux counts guest time within user time as well.
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        network = psutil.net_io_counters()
        disk = psutil.disk_io_counters()
        return Counters(
            at=self._clock(),
            cpu_busy_s=total - times.idle - getattr(times, "iowait", 0.0),
            cpu_total_s=total,
            cgroup_cpu_s=limits.cpu_used_s,
            network=NetworkIO(
                **(network._asdict() if network else dict.fromkeys(_NETWORK_FIELDS, 0)),
                bytes_sent_per_s=0,
                bytes_recv_per_s=0,
            ),
            disk=DiskIO(
                read_count=disk.read_count if disk else 0,
                write_count=disk.write_count if disk else 0,
                read_bytes=disk.read_bytes if disk else 0,
                write_bytes=disk.write_bytes if disk else 0,
                read_bytes_per_s=0,
                write_bytes_per_s=0,
            ),
            processes=self._count_processes() if processes else {},
        )

    def _count_processes(self) -> dict[ProcessKey, ProcessCount]:
        counts: dict[ProcessKey, ProcessCount] = {}
        kernel: set[ProcessKey] = set()
        for process in psutil.process_iter():
            # One that has ended meanwhile, or that we may not look at, is left out.
            with suppress(psutil.Error):
                key = (process.pid, process.create_time())
                memory_bytes = 0 if key in self._kernel else process.memory_info().rss
                if memory_bytes == 0:
                    kernel.add(key)
                    continue
                times = process.cpu_times()
                counts[key] = ProcessCount(process, times.user + times.system, memory_bytes)
        self._kernel = kernel
        return counts


def measure_memory(limits: Limits) -> Memory:
    """Return the machine's memory, or the container's where that is less.

    Page cache that can be dropped at once does not count as used, as in the kernel's own
    MemAvailable.
    """
    host = psutil.virtual_memory()
    if limits.memory_max is None or limits.memory_max >= host.total:
        return Memory(host.total, host.available)
    used = max(0, (limits.memory_current or 0) - limits.memory_reclaimable)
    return Memory(limits.memory_max, min(host.available, max(0, limits.memory_max - used)))


def read_disks() -> dict[str, DiskUsage]:
    """Return how full each mounted file system on a device is, and the root in any case."""
    partitions = [p for p in psutil.disk_partitions() if p.fstype not in _READ_ONLY_IMAGES]
    if all(partition.mountpoint != "/" for partition in partitions):
        # In a container the root is an overlay, which is on no device of its own.
        partitions += [p for p in psutil.disk_partitions(all=True) if p.mountpoint == "/"]
    disks: dict[str, DiskUsage] = {}
    for partition in sorted(partitions, key=lambda p: len(p.mountpoint)):
        if partition.device in disks:
            continue
        try:
            usage = psutil.disk_usage(partition.mountpoint)
        except OSError:
            continue
        disks[partition.device] = DiskUsage(
            total=usage.total,
            used=usage.used,
            free=usage.free,
            percent=usage.percent,
            mountpoint=partition.mountpoint,
        )
    return disks


_NETWORK_FIELDS = (
    "bytes_sent",
    "bytes_recv",
    "packets_sent",
    "packets_recv",
    "errin",
    "errout",
    "dropin",
    "dropout",
)


def _usable_cores(limits: Limits) -> float:
    bounds = (psutil.cpu_count(), limits.cpuset_cores, limits.cpu_quota_cores)
    return min(bound for bound in bounds if bound)


def _cpu_percent(before: Counters, now: Counters, cores: float) -> float:
    """Return the busy share of the usable cores between two counts."""
    is_limited = cores < (psutil.cpu_count() or 1)
    if is_limited and now.cgroup_cpu_s is not None and before.cgroup_cpu_s is not None:
        share = (now.cgroup_cpu_s - before.cgroup_cpu_s) / ((now.at - before.at) * cores)
    else:
        total = now.cpu_total_s - before.cpu_total_s
        share = (now.cpu_busy_s - before.cpu_busy_s) / total if total > 0 else 0.0
    return round(100 * min(1.0, max(0.0, share)), 1)


def _rate(before: float, now: float, seconds: float) -> float:
    # Counters start anew when an interface or a disk goes and comes back.
    return round(max(0.0, now - before) / seconds, 1)


def _with_network_rates(before: Counters, now: Counters) -> NetworkIO:
    seconds = now.at - before.at
    return now.network.model_copy(
        update={
            f"{name}_per_s": _rate(
                getattr(before.network, name), getattr(now.network, name), seconds
            )
            for name in ("bytes_sent", "bytes_recv")
        }
    )


def _with_disk_rates(before: Counters, now: Counters) -> DiskIO:
    seconds = now.at - before.at
    return now.disk.model_copy(
        update={
            f"{name}_per_s": _rate(getattr(before.disk, name), getattr(now.disk, name), seconds)
            for name in ("read_bytes", "write_bytes")
        }
    )


def _top_processes(before: Counters, now: Counters, memory_total: int) -> list[ProcessUsage]:
    seconds = now.at - before.at
    busy = {
        key: 100 * max(0.0, count.cpu_s - _cpu_before(before, key)) / seconds
        for key, count in now.processes.items()
    }
    by_memory = sorted(now.processes, key=lambda key: -now.processes[key].memory_bytes)[:TOP]
    by_cpu = sorted(busy, key=lambda key: -busy[key])[:TOP]
    chosen = dict.fromkeys([*by_memory, *(key for key in by_cpu if busy[key] >= 1)])
    found = (_describe(now.processes[key], key, busy[key], memory_total) for key in chosen)
    return sorted(filter(None, found), key=lambda usage: -usage.memory_bytes)


def _cpu_before(before: Counters, key: ProcessKey) -> float:
    # A process that was not there has used all its time since.
    return before.processes[key].cpu_s if key in before.processes else 0.0


def _describe(
    count: ProcessCount, key: ProcessKey, cpu_percent: float, memory_total: int
) -> ProcessUsage | None:
    try:
        with count.process.oneshot():
            return ProcessUsage(
                pid=key[0],
                name=printable(count.process.name()),
                user=_user(count.process.uids().effective),
                cpu_percent=round(cpu_percent, 1),
                memory_bytes=count.memory_bytes,
                memory_percent=round(100 * count.memory_bytes / memory_total, 1),
                nice=count.process.nice(),
                started_at=key[1],
            )
    except psutil.Error:
        return None  # it has ended meanwhile


@lru_cache(maxsize=256)
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def printable(text: str) -> str:
    """Return a name from the system as text that JSON and PostgreSQL can hold.

    Names of files and processes are bytes; those that are not UTF-8 are shown with escapes.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def names(usages: Iterable[ProcessUsage]) -> str:
    """Return processes as a sentence names them: `python (pid 12), …`."""
    return ", ".join(f"{usage.name} (pid {usage.pid})" for usage in usages)
