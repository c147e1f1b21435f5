"""What is unusual now: numbers far from their past, and processes that have grown.

A number is unusual when its modified z-score is beyond the threshold and the change is large
enough to matter. A process is named by pid when it grew by more than a bound within the window.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, Field, JsonValue

from sutazai import db
from sutazai.agent import Context
from sutazai.tasks.hardware_resource_optimizer import prediction, sampling, tables
from sutazai.tasks.hardware_resource_optimizer.measurement import TOP
from sutazai.tasks.hardware_resource_optimizer.reading import Metrics, ProcessUsage

FEWEST_SAMPLES = 8
"""With fewer there is no past that a number could be compared with."""

_MOST_SAMPLES = 240
_FRESH_S = 5.0


class AnomalyParams(BaseModel):
    """What to compare with, and what counts as unusual."""

    window_s: int = Field(
        default=3600, ge=60, le=172_800, description="How much of the past to compare with."
    )
    threshold: float = Field(
        default=3.5, ge=1, le=100, description="The modified z-score beyond which it is unusual."
    )
    min_growth_bytes: int = Field(
        default=128 << 20, ge=1 << 20, description="A process is named when it grew by this."
    )
    host: str | None = Field(
        default=None, max_length=255, description="By default the one that answers."
    )


class Anomaly(BaseModel):
    """One thing that is unusual, with what shows it."""

    kind: Literal["metric", "process_memory"]
    subject: str = Field(description="The metric's name, or the process with its pid.")
    pid: int | None = None
    value: float
    usual: float = Field(description="The median of the past; for a process, its earlier size.")
    score: float | None = Field(description="Modified z-score; null for a process.")
    message: str
    evidence: dict[str, JsonValue]


class Anomalies(BaseModel):
    """What is unusual in the newest reading, the most unusual first."""

    host: str
    timestamp: AwareDatetime = Field(description="Of the reading that was judged.")
    samples: int = Field(description="How many of the past it was compared with.")
    anomalies: list[Anomaly]


class Past(NamedTuple):
    """One earlier sample."""

    at: datetime
    metrics: Mapping[str, Any]


class _Watched(NamedTuple):
    """A number that is watched, and by how much it must change to matter."""

    read: Callable[[Mapping[str, Any]], float | None]
    least_change: float


def _psi(resource: str) -> Callable[[Mapping[str, Any]], float | None]:
    def read(metrics: Mapping[str, Any]) -> float | None:
        stall = ((metrics.get("psi") or {}).get(resource) or {}).get("some")
        return stall["avg60"] if stall else None

    return read


def _rate(part: str, name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda metrics: (metrics.get(part) or {}).get(name)


_WATCHED: dict[str, _Watched] = {
    "cpu_percent": _Watched(lambda metrics: metrics.get("cpu_percent"), 20.0),
    "memory_percent": _Watched(lambda metrics: metrics.get("memory_percent"), 5.0),
    "swap.percent": _Watched(_rate("swap", "percent"), 5.0),
    "psi.cpu.some.avg60": _Watched(_psi("cpu"), 10.0),
    "psi.memory.some.avg60": _Watched(_psi("memory"), 5.0),
    "psi.io.some.avg60": _Watched(_psi("io"), 10.0),
    "disk_io.read_bytes_per_s": _Watched(_rate("disk_io", "read_bytes_per_s"), 20e6),
    "disk_io.write_bytes_per_s": _Watched(_rate("disk_io", "write_bytes_per_s"), 20e6),
    "network_io.bytes_sent_per_s": _Watched(_rate("network_io", "bytes_sent_per_s"), 10e6),
    "network_io.bytes_recv_per_s": _Watched(_rate("network_io", "bytes_recv_per_s"), 10e6),
}


def detect(params: AnomalyParams, context: Context) -> Anomalies:
    """Judge the host's newest reading, a fresh one where that can be had, by its past."""
    here = params.host in (None, context.host)
    metrics = sampling.newest(
        context, max_age_s=_FRESH_S if here else params.window_s, host=params.host
    )
    window = timedelta(seconds=params.window_s)
    past = read_past(metrics, window)
    found = [
        *unusual_numbers(metrics, past, params.threshold),
        *grown_processes(metrics, past, window, params.min_growth_bytes),
    ]
    return Anomalies(
        host=metrics.host, timestamp=metrics.timestamp, samples=len(past), anomalies=found
    )


def read_past(metrics: Metrics, window: timedelta) -> list[Past]:
    """Return the host's samples of the window, without the reading itself."""
    query = tables.thinned_samples(metrics.host, window, _MOST_SAMPLES)
    with db.transaction() as connection:
        rows = connection.execute(query).all()
    own = metrics.model_dump(mode="json")["timestamp"]
    return [Past(row.sampled_at, row.metrics) for row in rows if row.metrics["timestamp"] != own]


def unusual_numbers(metrics: Metrics, past: Sequence[Past], threshold: float) -> list[Anomaly]:
    """Return the watched numbers that are far from their past, the farthest first."""
    now = metrics.model_dump()
    found = []
    for name, watched in _WATCHED.items():
        value = watched.read(now)
        earlier = [v for item in past if (v := watched.read(item.metrics)) is not None]
        if value is None or len(earlier) < FEWEST_SAMPLES:
            continue
        usual = statistics.median(earlier)
        unusual = prediction.score(value, earlier, watched.least_change / 10)
        if abs(unusual) < threshold or abs(value - usual) < watched.least_change:
            continue
        found.append(
            Anomaly(
                kind="metric",
                subject=name,
                value=value,
                usual=usual,
                score=round(unusual, 2),
                message=f"{name} is {value:.1f}; it usually is {usual:.1f}.",
                evidence={
                    "at": metrics.timestamp.isoformat(),
                    "samples": len(earlier),
                    "since": past[0].at.isoformat(),
                    "processes": [
                        {"pid": usage.pid, "name": usage.name, "cpu_percent": usage.cpu_percent}
                        for usage in _involved(name, metrics)
                    ],
                },
            )
        )
    return sorted(found, key=lambda anomaly: -abs(anomaly.score or 0))


def grown_processes(
    metrics: Metrics, past: Sequence[Past], window: timedelta, min_growth_bytes: int
) -> list[Anomaly]:
    """Return the processes that grew by so much within the window, the greediest first."""
    found = []
    for usage in metrics.top_processes:
        earlier = _earlier_size(usage, past, metrics.timestamp - window)
        growth = usage.memory_bytes - earlier
        if growth < min_growth_bytes:
            continue
        found.append(
            Anomaly(
                kind="process_memory",
                subject=f"{usage.name} (pid {usage.pid})",
                pid=usage.pid,
                value=usage.memory_bytes,
                usual=earlier,
                score=None,
                message=(
                    f"{usage.name} (pid {usage.pid}) grew by {growth >> 20} MiB to "
                    f"{usage.memory_bytes >> 20} MiB, {usage.memory_percent} % of memory."
                ),
                evidence={
                    "at": metrics.timestamp.isoformat(),
                    "pid": usage.pid,
                    "started_at": usage.started_at,
                    "user": usage.user,
                    "growth_bytes": growth,
                    "memory_percent": usage.memory_percent,
                },
            )
        )
    return sorted(found, key=lambda anomaly: anomaly.usual - anomaly.value)


def _earlier_size(usage: ProcessUsage, past: Sequence[Past], since: datetime) -> int:
    """Return what a process held when the past began, or the most that it can have held.

    One that has started since held nothing; one that was too small to be listed held at most as
    much as the last of those that are listed for their memory.
    """
    if usage.started_at >= since.timestamp():
        return 0
    sizes = []
    for item in past:
        listed = item.metrics.get("top_processes") or []
        own = [p for p in listed if (p["pid"], p["started_at"]) == (usage.pid, usage.started_at)]
        if own:
            sizes.append(own[0]["memory_bytes"])
        elif listed:
            sizes.append(listed[min(len(listed), TOP) - 1]["memory_bytes"])
    return min(sizes, default=usage.memory_bytes)


def _involved(name: str, metrics: Metrics) -> list[ProcessUsage]:
    """Return the three processes that a number most probably comes from."""
    if "memory" in name or "swap" in name:
        return metrics.top_processes[:3]
    return sorted(metrics.top_processes, key=lambda usage: -usage.cpu_percent)[:3]
