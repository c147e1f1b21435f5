"""Memory of processes, as the kernel counts it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

MIB = 2**20


def proportional_mib(processes: Iterable[psutil.Process]) -> float:
    """Return the proportional set size: pages that are shared count as one share each."""
    total_kib = 0
    for process in processes:
        with suppress(OSError):  # it has just ended
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total_kib += next(
                int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")
            )
    return total_kib / 1024


def resident_mib(process: psutil.Process) -> float:
    """Return the resident set size."""
    return float(process.memory_info().rss) / MIB
