"""The newest reading of a host: taken, shared through Redis, stored, and rolled up.

A hundred calls at once must not mean a hundred measurements: a call is served by any reading that
is young enough or was taken after the call was made, and only one process of a host measures at a
time.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from sutazai import db, payload, redis
from sutazai.agent import Context
from sutazai.errors import InvalidInput, SutazaiError, Unavailable
from sutazai.settings import settings
from sutazai.tasks.hardware_resource_optimizer import tables
from sutazai.tasks.hardware_resource_optimizer.measurement import Meter
from sutazai.tasks.hardware_resource_optimizer.reading import NUMBERS, Metrics

PERIOD = timedelta(seconds=30)
"""How often each host is sampled."""

KEY = "system:metrics"
"""The Redis hash of newest readings: field `current`, and one a host."""

STALE_S = 4 * PERIOD.total_seconds()
"""Health says so when the newest sample is older than this."""

_TURN_S = 2.0
"""A process that waits longer than this for its turn measures anyway: the holder may be stopped."""

_SKEW_KEPT_S = 60.0

meter = Meter()
"""This process's meter."""


class GetMetricsParams(BaseModel):
    """What is asked of `get_metrics`."""

    max_age_s: float = Field(
        default=30.0,
        ge=0,
        le=86_400,
        description="A sample up to this age will do; 0: one taken after the call.",
    )
    host: str | None = Field(
        default=None, max_length=255, description="Of which host; by default the one that answers."
    )


class MetricsResult(BaseModel):
    """The newest reading."""

    metrics: Metrics
    age_s: float = Field(description="How old it was when it was returned.")


class SampleResult(BaseModel):
    """What was stored."""

    sample_id: UUID
    host: str
    timestamp: AwareDatetime


@dataclass
class _Memory:
    """What this process remembers between tasks."""

    newest: Metrics | None = None
    upkeep_done: dict[tuple[str, int], int] = field(default_factory=dict)
    skew_s: float = 0.0
    skew_measured_at: float = float("-inf")


_memory = _Memory()


def get(params: GetMetricsParams, context: Context) -> MetricsResult:
    """Return the newest reading of a host that is young enough, measured anew if need be."""
    metrics = newest(context, max_age_s=params.max_age_s, host=params.host)
    return MetricsResult(metrics=metrics, age_s=round(max(0.0, _age_s(metrics)), 3))


def newest(context: Context, *, max_age_s: float, host: str | None = None) -> Metrics:
    """Return a reading that is younger than `max_age_s` or was taken after the call was made.

    Raises `InvalidInput` for a host that was never sampled, and `Unavailable` when another host's
    newest sample is too old: only a host itself can measure.
    """
    if host is not None and host != context.host:
        return _newest_of_other(host, max_age_s)
    found = _shared(context.host) or _remembered(context.host)
    if found and 0 <= _age_s(found) <= max_age_s:
        return found
    if found is None and (stored := _stored(context.host)) and stored[1] <= max_age_s:
        return stored[0]
    called_at = _called_at(context)
    if found and found.timestamp > called_at:
        return found
    with _turn():
        found = _shared(context.host) or _remembered(context.host)
        if found and found.timestamp > called_at:
            return found
        return measure(context.host)


def measure(host: str) -> Metrics:
    """Take a reading of this host and share it."""
    metrics = meter.read(host)
    text = metrics.model_dump_json()
    redis.attempt(lambda r: r.hset(KEY, mapping={"current": text, host: text}))
    _memory.newest = metrics
    return metrics


def stored(host: str) -> dict[str, Any] | None:
    """Return a host's newest stored sample as it stands in PostgreSQL, or None."""
    with db.transaction() as connection:
        row = connection.execute(tables.newest_sample(host)).first()
    return dict(row.metrics) if row else None


def known(host: str) -> Metrics | None:
    """Return another host's newest reading if it is recent enough to act on, else None."""
    try:
        return _newest_of_other(host, STALE_S)
    except SutazaiError:
        return None


def record(context: Context) -> SampleResult:
    """Take a reading and store it; roll up and prune older ones when that is due."""
    with _turn():
        metrics = measure(context.host)
    sample_id = uuid4()
    context.write(tables.insert_sample(sample_id, context.host, metrics.model_dump(mode="json")))
    keep_up(context, time.time())
    return SampleResult(sample_id=sample_id, host=context.host, timestamp=metrics.timestamp)


def check_health() -> str:
    """Return "ok", "absent" before the first sample, or how old the newest sample is."""
    text = redis.attempt(lambda r: r.hget(KEY, "current"))
    metrics = _parse(text)
    if metrics is None:
        return "absent"
    age_s = _age_s(metrics)
    return "ok" if age_s <= STALE_S else f"the newest sample is {age_s:.0f} s old"


def _age_s(metrics: Metrics) -> float:
    return (datetime.now(UTC) - metrics.timestamp).total_seconds()


def _shared(host: str) -> Metrics | None:
    return _parse(redis.attempt(lambda r: r.hget(KEY, host)))


def _parse(text: object) -> Metrics | None:
    if not isinstance(text, str):
        return None
    try:
        return Metrics.model_validate_json(text)
    except ValidationError:
        return None  # written by another version or another program


def _remembered(host: str) -> Metrics | None:
    """Return this process's own last reading: what is left to share without Redis."""
    found = _memory.newest
    return found if found and found.host == host else None


def _stored(host: str) -> tuple[Metrics, float] | None:
    """Return a host's newest row and its age in seconds; None without one or without PostgreSQL."""
    try:
        with db.transaction() as connection:
            row = connection.execute(tables.newest_sample(host)).first()
    except SutazaiError:
        return None
    metrics = _parse(payload.dumps(row.metrics)) if row else None
    return (metrics, float(row.age_s)) if row and metrics else None


def _newest_of_other(host: str, max_age_s: float) -> Metrics:
    found = _shared(host)
    if found and 0 <= _age_s(found) <= max_age_s:
        return found
    stored = _stored(host)
    if stored is None:
        with db.transaction() as connection:
            known = connection.execute(tables.known_hosts()).scalars().all()
        raise InvalidInput(
            f"There is no sample of the host {host!r}; there are samples of: "
            f"{', '.join(known) or 'no host yet'}."
        )
    metrics, age_s = stored
    if age_s > max_age_s:
        raise Unavailable(
            f"The newest sample of {host} is {age_s:.0f} s old; only {host} itself can measure."
        )
    return metrics


def _called_at(context: Context) -> datetime:
    """Return when the task was accepted, by this host's clock.

    `created_at` is PostgreSQL's. Without PostgreSQL the clocks are taken to agree.
    """
    now = time.monotonic()
    if now - _memory.skew_measured_at > _SKEW_KEPT_S:
        try:
            with db.transaction() as connection:
                theirs: datetime = connection.execute(tables.clock()).scalar_one()
            _memory.skew_s = (datetime.now(UTC) - theirs).total_seconds()
        except SutazaiError:
            _memory.skew_s = 0.0
        _memory.skew_measured_at = now
    return context.created_at + timedelta(seconds=_memory.skew_s)


@contextmanager
def _turn() -> Iterator[None]:
    """Let one process of this host measure at a time; the kernel frees a dead holder's lock.

    Without a place for the lock everybody measures: that costs time, and nothing else.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(lock_path(), flags, 0o600)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + _TURN_S
        while not _lock(descriptor) and time.monotonic() < deadline:
            time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)


def lock_path() -> Path:
    """Return where this host's processes of our user meet; a home may be shared by hosts."""
    home = settings().home
    folder = home if os.access(home, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    return folder / f"measurement-{socket.gethostname()}-{os.getuid()}.lock"


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def keep_up(context: Context, now_s: float) -> None:
    """Once a bucket: roll up what is complete and prune what is past its time.

    Every process remembers the bucket for itself; doing it twice changes nothing.
    """
    host = context.host
    if _is_new_bucket(host, tables.FIVE_MINUTES_S, now_s):
        numbers = [(name, number.path) for name, number in NUMBERS.items()]
        context.write(tables.roll_up(host, numbers))
        context.write(tables.prune_samples())
    if _is_new_bucket(host, tables.HOUR_S, now_s):
        context.write(tables.roll_up_hours(host))
        for rollup_s in tables.ROLLUPS_KEPT:
            context.write(tables.prune_rollups(rollup_s))
        context.write(tables.prune_plans())
        context.write(tables.prune_audit())


def _is_new_bucket(host: str, rollup_s: int, now_s: float) -> bool:
    bucket = int((now_s - tables.LATE_S) // rollup_s)
    is_new = _memory.upkeep_done.get((host, rollup_s)) != bucket
    _memory.upkeep_done[host, rollup_s] = bucket
    return is_new
