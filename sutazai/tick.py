"""When a schedule is due: the arithmetic of periods and cron expressions, without any clock.

Every function is given the instants it works on, which are the database's, so any number of Beats
compute the same ticks. docs/decisions/0010 says why it is done like this.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from sutazai.errors import InvalidInput

ON_TIME_S = 15.0
"""A tick that is taken so late was not missed: every Beat may have been busy or just restarted."""

MAX_COUNTED = 10_000
"""Missed ticks of a cron expression are counted up to here, one by one, while Beat waits."""

CRON_FIELDS = 5

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_SECOND = timedelta(seconds=1)


@dataclass(frozen=True)
class Tick:
    """One due time of a schedule, and the one that follows it."""

    at: datetime
    next_at: datetime


@dataclass(frozen=True)
class Due:
    """What has become due: the ticks to take, how many are given up, and the next one to come."""

    ticks: list[Tick]
    missed: int
    next_at: datetime


@dataclass(frozen=True)
class Timing:
    """When a schedule ticks: at every multiple of a period, or as a cron expression says.

    A cron expression has five fields and is read as Debian's cron reads it. In a time zone with
    summer time, a fixed time of day that the clock leaps over comes when it has leapt, and one that
    comes twice counts once; `*` in the minute or hour means real time, which neither happens to.
    """

    every_s: float | None = None
    cron: str | None = None
    time_zone: str = "UTC"

    def check(self) -> None:
        """Raise `InvalidInput` that names the field at fault."""
        if (self.every_s is None) == (self.cron is None):
            raise _fault("every_s", "Give either every_s or cron.")
        try:
            ZoneInfo(self.time_zone)
        except (KeyError, ValueError, OSError):
            raise _fault(
                "time_zone", f"There is no time zone {self.time_zone!r}; give one as Europe/Berlin."
            ) from None
        if self.cron is None:
            return
        if len(self.cron.split()) != CRON_FIELDS:
            raise _fault(
                "cron", "Give five fields: minute, hour, day of month, month, day of week."
            )
        try:
            self.after(_EPOCH)
        except (CronSimError, LookupError) as error:
            raise _fault("cron", f"{self.cron!r} is no cron expression: {error}.") from None

    def after(self, instant: datetime) -> datetime:
        """Return the first tick after an instant."""
        if self.every_s is None:
            found = next(self._cron_after(instant), None)
            if found is None:
                raise LookupError("it never comes")
            return found
        return _EPOCH + (self._count(instant) + 1) * self._period

    def latest(self, instant: datetime) -> datetime:
        """Return the last tick of a period up to an instant."""
        return _EPOCH + self._count(instant) * self._period

    def due(self, next_at: datetime, now: datetime, catch_up: int) -> Due:
        """Return what is due of the ticks from `next_at` until now.

        The latest `catch_up` of them are taken; with 0 the latest one if it is on time.
        """
        total, ticks = self._passed(next_at, now, max(1, catch_up))
        if not catch_up and ticks and now - ticks[-1] > timedelta(seconds=ON_TIME_S):
            ticks = []
        following = self.after(now)
        ends = [*ticks[1:], following]
        taken = [Tick(at, end) for at, end in zip(ticks, ends, strict=False)]
        return Due(taken, total - len(ticks), following)

    @property
    def _period(self) -> timedelta:
        return timedelta(seconds=self.every_s or 0)

    def _count(self, instant: datetime) -> int:
        """Return how many whole periods fit between the epoch and an instant (exact integers)."""
        return (instant - _EPOCH) // self._period

    def _passed(self, since: datetime, now: datetime, most: int) -> tuple[int, list[datetime]]:
        """Count the ticks within [since, now], and return the latest of them."""
        if self.every_s is not None:
            last = self._count(now)
            total = max(0, last - self._count(since - _MICROSECOND))
            wanted = range(last - min(total, most) + 1, last + 1)
            return total, [_EPOCH + number * self._period for number in wanted]
        kept: deque[datetime] = deque(maxlen=most)
        total = 0
        for tick in self._cron_after(since - _MICROSECOND):
            if tick > now:
                return total, list(kept)
            if total == MAX_COUNTED:
                return total, self._cron_before(now, most)
            kept.append(tick)
            total += 1
        return total, list(kept)

    def _cron_after(self, instant: datetime) -> Iterator[datetime]:
        """Yield the ticks after an instant, each once and in order."""
        # cronsim goes by wall time, where an hour can come twice and two times can become one.
        start = (instant - _SECOND).astimezone(ZoneInfo(self.time_zone))
        last = instant
        for found in CronSim(self.cron or "", start):
            tick = found.astimezone(UTC)
            if tick > last:
                last = tick
                yield tick

    def _cron_before(self, instant: datetime, most: int) -> list[datetime]:
        """Return the latest ticks up to an instant."""
        start = (instant + _SECOND).astimezone(ZoneInfo(self.time_zone))
        found: list[datetime] = []
        for wall in CronSim(self.cron or "", start, reverse=True):
            tick = wall.astimezone(UTC)
            if tick <= instant and (not found or tick < found[-1]):
                found.append(tick)
            if len(found) == most:
                break
        return found[::-1]


def jitter(name: str, tick: Tick, most_s: float) -> timedelta:
    """Return by how much a tick's task starts later: always the same, and before the next tick."""
    seed = f"{name} {tick.at.timestamp():.6f}".encode()
    chance = int.from_bytes(hashlib.sha256(seed).digest()[:8]) / 2**64
    return min(timedelta(seconds=most_s), tick.next_at - tick.at) * chance


def _fault(field: str, message: str) -> InvalidInput:
    return InvalidInput(f"{field}: {message}", details=[{"field": field, "message": message}])
