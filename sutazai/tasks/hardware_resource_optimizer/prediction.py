"""Robust statistics: a trend that outliers cannot bend, and a score of how unusual a value is.

The trend is Theil's and Sen's (Sen 1968, "Estimates of the regression coefficient based on
Kendall's tau"): the median of the slopes between all pairs of points. The score is the modified
z-score of Iglewicz and Hoaglin (1993), from the median and the median absolute deviation.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, Field

from sutazai.agent import Context
from sutazai.errors import InvalidInput
from sutazai.tasks.hardware_resource_optimizer import history, sampling
from sutazai.tasks.hardware_resource_optimizer.reading import NUMBERS

FEWEST_POINTS = 5
"""With fewer there is no trend to speak of."""

_MOST_POINTS = 240
"""All pairs of points are looked at, so their number is bounded."""

_NORMAL_95 = 1.96
_MAD_TO_SIGMA = 0.6745

Resource = Literal["disk", "memory", "swap"]

_USED: dict[Resource, str] = {
    "disk": "disk_usage.used",
    "memory": "memory_available",
    "swap": "swap.used",
}


class ForecastParams(BaseModel):
    """What is looked ahead for, and from how much of the past."""

    resource: Resource = Field(default="disk", description="What may run full.")
    horizon_s: int = Field(
        default=7 * 86_400, ge=60, le=366 * 86_400, description="How far to look ahead."
    )
    window_s: int = Field(
        default=86_400, ge=60, le=366 * 86_400, description="How much of the past to learn from."
    )
    device: str | None = Field(
        default=None, max_length=255, description="Which disk; by default the fullest."
    )
    host: str | None = Field(
        default=None, max_length=255, description="By default the one that answers."
    )


class Forecast(BaseModel):
    """When something runs full, if it goes on as it did. The band holds with 95 % confidence."""

    resource: Resource
    device: str | None
    host: str
    points: int = Field(description="How many points of the past it rests on.")
    capacity_bytes: int
    used_bytes: int
    slope_bytes_per_s: float | None = Field(description="Null with too few points.")
    slope_low_bytes_per_s: float | None = None
    slope_high_bytes_per_s: float | None = None
    seconds_until_full: float | None = Field(default=None, description="Null: not at this trend.")
    seconds_until_full_low: float | None = Field(default=None, description="At the steeper bound.")
    seconds_until_full_high: float | None = Field(
        default=None, description="At the flatter bound; null when that one never fills it."
    )
    full_at: AwareDatetime | None = Field(default=None, description="Null beyond the horizon too.")
    used_bytes_at_horizon: int | None = Field(default=None, description="Never above capacity.")
    message: str


class Trend(NamedTuple):
    """A line through points, with the bounds of its slope at 95 % confidence."""

    slope: float
    intercept: float
    slope_low: float
    slope_high: float

    def at(self, x: float) -> float:
        """Return the line's value."""
        return self.intercept + self.slope * x


def fit(points: Sequence[tuple[float, float]]) -> Trend:
    """Return the Theil-Sen line through (x, y) points; needs two different x."""
    slopes = sorted(
        (y2 - y1) / (x2 - x1)
        for (x1, y1), (x2, y2) in itertools.combinations(points, 2)
        if x1 != x2
    )
    slope = statistics.median(slopes)
    intercept = statistics.median(y - slope * x for x, y in points)
    count, pairs = len(points), len(slopes)
    spread = _NORMAL_95 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = max(0, math.floor((pairs - spread) / 2))
    high = min(pairs - 1, math.ceil((pairs + spread) / 2))
    return Trend(slope, intercept, slopes[low], slopes[high])


def score(value: float, past: Sequence[float], least_spread: float) -> float:
    """Return the modified z-score of a value against the past; beyond 3.5 it is unusual.

    `least_spread` is the deviation that counts as nothing: a constant past has none of its own,
    and the smallest change would be infinitely unusual.
    """
    median = statistics.median(past)
    mad = statistics.median(abs(item - median) for item in past)
    return _MAD_TO_SIGMA * (value - median) / max(mad, least_spread)


def predict(params: ForecastParams, context: Context) -> Forecast:
    """Return when a resource runs full, from the host's newest sample and the trend of its past."""
    host = params.host or context.host
    newest = sampling.stored(host)
    if newest is None:
        newest = sampling.newest(context, max_age_s=60, host=params.host).model_dump()
    device, used, capacity = _now(params, newest)
    points = _past(params, host, device, newest)
    forecast = Forecast(
        resource=params.resource,
        device=device,
        host=host,
        points=len(points),
        capacity_bytes=capacity,
        used_bytes=used,
        slope_bytes_per_s=None,
        message=f"{len(points)} points in the window; a trend needs {FEWEST_POINTS}.",
    )
    if len(points) >= FEWEST_POINTS:
        _extend(forecast, points, params.horizon_s)
    return forecast


def _extend(forecast: Forecast, points: Sequence[tuple[float, float]], horizon_s: float) -> None:
    """Add the trend of the past, and what follows from it."""
    now = datetime.now(UTC)
    # Counted from now, so that the numbers stay small and the intercept is the value of today.
    trend = fit([(at - now.timestamp(), value) for at, value in points])
    left = max(0.0, forecast.capacity_bytes - trend.intercept)
    forecast.slope_bytes_per_s = trend.slope
    forecast.slope_low_bytes_per_s = trend.slope_low
    forecast.slope_high_bytes_per_s = trend.slope_high
    forecast.seconds_until_full = _until(left, trend.slope)
    forecast.seconds_until_full_low = _until(left, trend.slope_high)
    forecast.seconds_until_full_high = _until(left, trend.slope_low)
    forecast.used_bytes_at_horizon = round(
        min(forecast.capacity_bytes, max(0.0, trend.at(horizon_s)))
    )
    name = forecast.device or forecast.resource
    until = forecast.seconds_until_full
    if until is None:
        forecast.message = f"{name} does not fill at the present trend."
    elif until <= horizon_s:
        forecast.full_at = now + timedelta(seconds=until)
        forecast.message = f"{name} is full in {until / 3600:.1f} hours at the present trend."
    else:
        forecast.message = f"{name} does not run full within the horizon."


def _until(left: float, slope: float) -> float | None:
    return left / slope if slope > 0 else None


def _now(params: ForecastParams, newest: Mapping[str, Any]) -> tuple[str | None, int, int]:
    """Return the device, what is used of it now, and what it can hold."""
    if params.resource == "memory":
        total: int = newest["memory_total"]
        return None, total - newest["memory_available"], total
    if params.resource == "swap":
        return None, newest["swap"]["used"], newest["swap"]["total"]
    disks = newest["disk_usage"]
    if not disks:
        raise InvalidInput("The newest sample names no disk.")
    device = params.device or max(disks, key=lambda name: disks[name]["percent"])
    if device not in disks:
        raise InvalidInput(f"There is no disk {device!r}; there are: {', '.join(disks)}.")
    # Not the total: some file systems reserve a part of it for the superuser.
    return device, disks[device]["used"], disks[device]["used"] + disks[device]["free"]


def _past(
    params: ForecastParams, host: str, device: str | None, newest: Mapping[str, Any]
) -> list[tuple[float, float]]:
    """Return (unix seconds, bytes used) pairs."""
    number = NUMBERS[_USED[params.resource]]
    window = timedelta(seconds=params.window_s)
    points = history.values(host, number, device, window, _MOST_POINTS)
    if params.resource == "memory":
        return [(at, newest["memory_total"] - value) for at, value in points]
    return points
