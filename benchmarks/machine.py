"""What was measured on what: the machine and the versions."""

from __future__ import annotations

import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

_PACKAGES = (
    *("sutazai", "celery", "kombu", "redis", "hiredis", "psycopg", "sqlalchemy", "fastapi"),
    *("uvicorn", "uvloop", "flower", "dramatiq", "taskiq", "taskiq-redis", "arq", "huey", "rq"),
    "procrastinate",
)


def processor() -> str:
    """Return the model of the processor."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.processor()


def machine() -> str:
    """Describe the machine in one line."""
    cores = psutil.cpu_count()
    memory_gib = psutil.virtual_memory().total / 2**30
    system = f"{platform.system()} {platform.release()}"
    return f"{processor()}, {cores} cores, {memory_gib:.0f} GiB of memory, {system}"


def sync_ms(folder: Path, times: int = 100) -> float:
    """Return how long the disk takes to keep one page: what a durable commit waits for.

    The page is there already, as those of PostgreSQL's log are: a file that grows takes longer.
    """
    took = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(bytes(8192 * times))
        os.fsync(file.fileno())
        for number in range(times):
            began = time.perf_counter()
            os.pwrite(file.fileno(), bytes(8192), 8192 * number)
            os.fdatasync(file.fileno())
            took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


def packages() -> Iterator[str]:
    """Name every package that was measured, with its version."""
    yield f"Python {platform.python_version()}"
    for name in _PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name}: not installed"
