"""Series of one number over time, from raw samples and from roll-ups, and forecasts of it."""

from __future__ import annotations

import math
import statistics
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, Field

from sutazai import db
from sutazai.agent import Context
from sutazai.errors import InvalidInput
from sutazai.tasks.hardware_resource_optimizer import tables
from sutazai.tasks.hardware_resource_optimizer.reading import NUMBERS, MetricName, Number

Aggregate = Literal["avg", "min", "max", "last"]
Resolution = Literal["raw", "5min", "hourly"]

MOST_POINTS = 5000
_USUAL_POINTS = 300
_FINEST_S = 30
_READ_RAW = timedelta(hours=6)
_ROLLUPS: dict[Resolution, int] = {"5min": tables.FIVE_MINUTES_S, "hourly": tables.HOUR_S}


class HistoryParams(BaseModel):
    """Which number, of which host, from when to when, in which steps."""

    metric: MetricName = Field(description="A number of the sample.")
    device: str | None = Field(
        default=None,
        max_length=255,
        description="For numbers one a device: the disk's name, or the index of the GPU.",
    )
    host: str | None = Field(
        default=None, max_length=255, description="By default the one that answers."
    )
    since: AwareDatetime | None = Field(default=None, description="By default an hour ago.")
    until: AwareDatetime | None = Field(default=None, description="By default now.")
    step_s: int | None = Field(
        default=None,
        ge=1,
        le=366 * 86_400,
        description="Length of a step; by default so that there are at most 300.",
    )
    agg: Aggregate = Field(default="avg", description="What a step tells of the values in it.")


class Point(BaseModel):
    """One step of a series."""

    at: AwareDatetime = Field(description="Where the step begins.")
    value: float
    samples: int


class Series(BaseModel):
    """One number over time; steps without a sample are left out."""

    metric: str
    device: str | None
    host: str
    unit: str
    agg: Aggregate
    step_s: int
    resolution: Resolution = Field(
        description="Raw samples are kept 48 h, 5-minute roll-ups 30 days, hourly ones a year."
    )
    since: AwareDatetime
    until: AwareDatetime
    points: list[Point]


class Bin(NamedTuple):
    """What is known of the values in one step."""

    samples: int
    sum: float
    least: float
    greatest: float
    last: float

    def merge(self, later: Bin) -> Bin:
        """Join it with what a later source knows of the same step."""
        return Bin(
            self.samples + later.samples,
            self.sum + later.sum,
            min(self.least, later.least),
            max(self.greatest, later.greatest),
            later.last,
        )

    def value(self, agg: Aggregate) -> float:
        """Return the aggregate."""
        values = {
            "avg": self.sum / self.samples,
            "min": self.least,
            "max": self.greatest,
            "last": self.last,
        }
        return values[agg]


def get(params: HistoryParams, context: Context) -> Series:
    """Return a series from the finest source that still reaches back so far."""
    number = NUMBERS[params.metric]
    if number.is_per_device and params.device is None:
        raise InvalidInput(f"{params.metric} is one a device; name it in `device`.")
    until = params.until or datetime.now(UTC)
    since = params.since or until - timedelta(hours=1)
    if since >= until:
        raise InvalidInput("`since` must be before `until`.")
    resolution = _resolution(since)
    step_s = _step(params.step_s, resolution, (until - since).total_seconds())
    host = params.host or context.host
    bins = read(host, number, params.device, Span(since, until, step_s, resolution))
    return Series(
        metric=params.metric,
        device=params.device,
        host=host,
        unit=number.unit,
        agg=params.agg,
        step_s=step_s,
        resolution=resolution,
        since=since,
        until=until,
        points=[
            Point(at=at, value=found.value(params.agg), samples=found.samples)
            for at, found in sorted(bins.items())
        ],
    )


class Span(NamedTuple):
    """From when to when, in which steps, from which source."""

    since: datetime
    until: datetime
    step_s: int
    resolution: Resolution


def read(host: str, number: Number, device: str | None, span: Span) -> dict[datetime, Bin]:
    """Return the steps of a series; what is not rolled up yet comes from the raw samples."""
    since, until, step_s, resolution = span
    step = timedelta(seconds=step_s)
    path = [(device or "") if part == "{device}" else part for part in number.path]
    bins: dict[datetime, Bin] = {}
    with db.transaction() as connection:
        raw_since = since
        if resolution != "raw":
            rollup_s = _ROLLUPS[resolution]
            rolled = tables.rolled_series(
                host, number.key(device), rollup_s=rollup_s, since=since, until=until, step=step
            )
            bins = {row.bin_at: _bin(row) for row in connection.execute(rolled)}
            newest = connection.execute(tables.rolled_until(host, rollup_s)).scalar_one()
            if newest is not None:
                raw_since = max(since, newest + timedelta(seconds=rollup_s))
        raw = tables.raw_series(host, path, since=raw_since, until=until, step=step)
        for row in connection.execute(raw):
            known = bins.get(row.bin_at)
            bins[row.bin_at] = known.merge(_bin(row)) if known else _bin(row)
    return bins


def values(
    host: str, number: Number, device: str | None, window: timedelta, most: int
) -> list[tuple[float, float]]:
    """Return (unix seconds, value) pairs over a window that ends now.

    Of a long window what is rolled up comes from there. Neighbours are joined into their means
    until there are at most so many.
    """
    until = datetime.now(UTC)
    since = until - window
    points: list[tuple[float, float]] = []
    if window > _READ_RAW:
        resolution = "5min" if _resolution(since) == "raw" else _resolution(since)
        step_s = _ROLLUPS[resolution]
        with db.transaction() as connection:
            newest = connection.execute(tables.rolled_until(host, step_s)).scalar_one()
        if newest is not None:
            rolled_until = newest + timedelta(seconds=step_s)
            points = _points(host, number, device, Span(since, rolled_until, step_s, resolution))
            since = max(since, rolled_until)
    points += _points(host, number, device, Span(since, until, 1, "raw"))
    size = math.ceil(len(points) / most) or 1
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (statistics.fmean(at for at, _ in chunk), statistics.fmean(value for _, value in chunk))
        for chunk in chunks
    ]


def _points(host: str, number: Number, device: str | None, span: Span) -> list[tuple[float, float]]:
    bins = read(host, number, device, span)
    middle = 0 if span.resolution == "raw" else span.step_s / 2
    return [(at.timestamp() + middle, found.value("avg")) for at, found in sorted(bins.items())]


def _bin(row: Any) -> Bin:
    return Bin(row.count, row.sum, row.least, row.greatest, row.last)


def _resolution(since: datetime) -> Resolution:
    age = datetime.now(UTC) - since
    if age <= tables.RAW_KEPT:
        return "raw"
    return "5min" if age <= tables.ROLLUPS_KEPT[tables.FIVE_MINUTES_S] else "hourly"


def _step(wanted_s: int | None, resolution: Resolution, span_s: float) -> int:
    """Return the length of a step: a multiple of what the source has, and not too many of them."""
    source_s = _ROLLUPS.get(resolution)
    step_s = wanted_s or max(_FINEST_S, math.ceil(span_s / _USUAL_POINTS))
    if source_s:
        step_s = math.ceil(step_s / source_s) * source_s
    if span_s / step_s > MOST_POINTS:
        raise InvalidInput(
            f"That would be {span_s / step_s:.0f} steps of {step_s} s; at most {MOST_POINTS} are "
            f"told. Take a `step_s` of at least {math.ceil(span_s / MOST_POINTS)}."
        )
    return step_s
