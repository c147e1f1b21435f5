"""Suggestions, written by rules from the data; each names the numbers that led to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field, JsonValue

from sutazai.agent import Context
from sutazai.tasks.hardware_resource_optimizer import prediction, sampling
from sutazai.tasks.hardware_resource_optimizer.anomaly import Anomaly, AnomalyParams, detect
from sutazai.tasks.hardware_resource_optimizer.measurement import names
from sutazai.tasks.hardware_resource_optimizer.prediction import Forecast, ForecastParams
from sutazai.tasks.hardware_resource_optimizer.reading import Metrics, Pressure, ProcessUsage

Severity = Literal["info", "warning", "critical"]

CRITICAL_PERCENT = 95.0
SWAP_PERCENT = 50.0
LOAD_PER_CORE = 2.0
STALL_PERCENT = {"cpu": 30.0, "memory": 10.0, "io": 30.0}
"""Share of the last minute in which something stood still, from which on it is worth a word."""

_ORDER: dict[Severity, int] = {"critical": 0, "warning": 1, "info": 2}


class Suggestion(BaseModel):
    """One sentence of advice, and the measurements behind it."""

    rule: str
    severity: Severity
    message: str
    evidence: dict[str, JsonValue]


class RecommendParams(BaseModel):
    """What to look at."""

    window_s: int = Field(
        default=3600, ge=60, le=172_800, description="How much of the past to compare with."
    )
    horizon_s: int = Field(
        default=7 * 86_400, ge=60, le=366 * 86_400, description="How far to look ahead."
    )
    threshold_percent: float = Field(
        default=80.0, ge=0, le=100, description="The use from which on there is something to say."
    )
    host: str | None = Field(
        default=None, max_length=255, description="By default the one that answers."
    )


class Recommendations(BaseModel):
    """What to do, the most urgent first."""

    host: str
    degraded: bool = Field(default=True, description="No language model took part.")
    source: Literal["rules"] = "rules"
    suggestions: list[Suggestion]


def recommend(params: RecommendParams, context: Context) -> Recommendations:
    """Look at the present, at what is unusual, and at what will run full."""
    anomalies = detect(AnomalyParams(window_s=params.window_s, host=params.host), context)
    metrics = sampling.newest(context, max_age_s=params.window_s, host=params.host)
    found = [
        *advise_memory(metrics, params.threshold_percent),
        *advise_cpu(metrics, params.threshold_percent),
        *advise_disk(metrics, params.threshold_percent),
        *(_of_anomaly(item) for item in anomalies.anomalies),
        *_of_forecasts(params, metrics, context),
    ]
    return Recommendations(
        host=metrics.host, suggestions=sorted(found, key=lambda item: _ORDER[item.severity])
    )


def advise_memory(metrics: Metrics, threshold_percent: float) -> Iterator[Suggestion]:
    """Say what the reading tells of memory."""
    largest = metrics.top_processes[:3]
    if metrics.memory_percent >= threshold_percent:
        yield Suggestion(
            rule="memory_high",
            severity=_severity(metrics.memory_percent),
            message=(
                f"Memory is used to {metrics.memory_percent} %; most is held by {names(largest)}."
            ),
            evidence=_evidence(
                metrics,
                memory_percent=metrics.memory_percent,
                memory_available_bytes=metrics.memory_available,
                processes=_brief(largest),
            ),
        )
    if metrics.swap.total and metrics.swap.percent >= SWAP_PERCENT:
        yield Suggestion(
            rule="swap_high",
            severity="warning",
            message=f"Swap is used to {metrics.swap.percent} %, so memory has been short.",
            evidence=_evidence(metrics, swap_percent=metrics.swap.percent),
        )
    yield from _stalled("memory", metrics.psi.memory, metrics)


def advise_cpu(metrics: Metrics, threshold_percent: float) -> Iterator[Suggestion]:
    """Say what the reading tells of CPU time."""
    busiest = sorted(metrics.top_processes, key=lambda usage: -usage.cpu_percent)[:3]
    per_core = metrics.load.avg5 / metrics.cpu_count
    if metrics.cpu_percent >= threshold_percent:
        yield Suggestion(
            rule="cpu_high",
            severity=_severity(metrics.cpu_percent),
            message=f"The cores are {metrics.cpu_percent} % busy, mostly with {names(busiest)}.",
            evidence=_evidence(metrics, cpu_percent=metrics.cpu_percent, processes=_brief(busiest)),
        )
    if per_core >= LOAD_PER_CORE:
        yield Suggestion(
            rule="load_high",
            severity="warning",
            message=f"Over 5 minutes {per_core:.1f} processes a core wanted to run.",
            evidence=_evidence(metrics, load_avg5=metrics.load.avg5, cpu_count=metrics.cpu_count),
        )
    yield from _stalled("cpu", metrics.psi.cpu, metrics)


def advise_disk(metrics: Metrics, threshold_percent: float) -> Iterator[Suggestion]:
    """Say what the reading tells of disks."""
    for device, usage in metrics.disk_usage.items():
        if usage.percent >= threshold_percent:
            yield Suggestion(
                rule="disk_high",
                severity=_severity(usage.percent),
                message=(
                    f"{device} ({usage.mountpoint}) is {usage.percent} % full; "
                    f"{usage.free >> 20} MiB are free. optimize_disk finds what can go."
                ),
                evidence=_evidence(
                    metrics, device=device, percent=usage.percent, free_bytes=usage.free
                ),
            )
    yield from _stalled("io", metrics.psi.io, metrics)


ADVISERS: dict[str, Callable[[Metrics, float], Iterator[Suggestion]]] = {
    "memory": advise_memory,
    "cpu": advise_cpu,
    "disk": advise_disk,
}


def _stalled(resource: str, pressure: Pressure | None, metrics: Metrics) -> Iterator[Suggestion]:
    bound = STALL_PERCENT[resource]
    if pressure and pressure.some and pressure.some.avg60 >= bound:
        yield Suggestion(
            rule=f"{resource}_stalls",
            severity="critical" if pressure.full and pressure.full.avg60 >= bound else "warning",
            message=(
                f"Something stood still for want of {resource} in {pressure.some.avg60:.0f} % of "
                "the last minute."
            ),
            evidence=_evidence(metrics, psi=pressure.model_dump()),
        )


def _of_anomaly(anomaly: Anomaly) -> Suggestion:
    return Suggestion(
        rule=f"anomaly_{anomaly.kind}",
        severity="warning",
        message=anomaly.message,
        evidence={"subject": anomaly.subject, "score": anomaly.score, **anomaly.evidence},
    )


def _of_forecasts(
    params: RecommendParams, metrics: Metrics, context: Context
) -> Iterator[Suggestion]:
    # Of the stored sample: a disk that was mounted a moment ago has no past yet.
    newest = sampling.stored(metrics.host) or {}
    for device in newest.get("disk_usage") or {}:
        found = prediction.predict(
            ForecastParams(device=device, host=params.host, horizon_s=params.horizon_s), context
        )
        if found.full_at is not None:
            yield _of_forecast(found)


def _of_forecast(found: Forecast) -> Suggestion:
    hours = (found.seconds_until_full or 0) / 3600
    evidence = found.model_dump(mode="json", exclude={"message"})
    return Suggestion(
        rule="disk_fills",
        severity="critical" if hours < 24 else "warning",
        message=found.message,
        evidence=evidence,
    )


def _severity(percent: float) -> Severity:
    return "critical" if percent >= CRITICAL_PERCENT else "warning"


def _evidence(metrics: Metrics, **values: Any) -> dict[str, JsonValue]:
    return {"host": metrics.host, "at": metrics.timestamp.isoformat(), **values}


def _brief(usages: Iterable[ProcessUsage]) -> list[dict[str, JsonValue]]:
    return [
        {
            "pid": usage.pid,
            "name": usage.name,
            "cpu_percent": usage.cpu_percent,
            "memory_bytes": usage.memory_bytes,
        }
        for usage in usages
    ]
