"""Samples in PostgreSQL and Redis: stored, rolled up, pruned, read back, looked ahead from."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from sutazai import db, redis
from sutazai.agent import Action
from sutazai.errors import InvalidInput, Unavailable
from sutazai.tasks.hardware_resource_optimizer import (
    agent,
    anomaly,
    history,
    prediction,
    sampling,
    tables,
)
from sutazai.tasks.hardware_resource_optimizer.measurement import Meter
from sutazai.tasks.hardware_resource_optimizer.reading import NUMBERS, DiskUsage, Metrics
from sutazai.testing import context

GIB = 1 << 30
MIB = 1 << 20
READING = Meter().read("here")


@pytest.fixture(autouse=True)
def clean(database: object) -> Iterator[None]:
    """A clean database and Redis, and a process that remembers nothing."""
    forget()
    yield
    forget()


def forget() -> None:
    redis.attempt(lambda r: r.delete(sampling.KEY))
    sampling._memory = sampling._Memory()


def call(name: str, host: str = "here", **params: Any) -> Any:
    """Call an action plainly and commit what it writes, as a worker does."""
    action: Action[Any, Any] = agent.get(name)
    seen = context(host=host)
    result = action(action.parse(params), seen)
    assert not isinstance(result, tuple)
    action.dump(result)
    with db.transaction() as connection:
        for statement in seen.written:
            connection.execute(statement)
    return result


def insert(host: str, at: datetime, **changes: Any) -> None:
    metrics = READING.model_copy(update={"host": host, "timestamp": at, **changes})
    with db.transaction() as connection:
        connection.execute(tables.insert_sample(uuid4(), host, metrics.model_dump(mode="json"), at))


def insert_many(rows: list[tuple[datetime, dict[str, Any]]], host: str = "here") -> None:
    with db.transaction() as connection:
        for at, changes in rows:
            metrics = READING.model_copy(update={"host": host, "timestamp": at, **changes})
            connection.execute(
                tables.insert_sample(uuid4(), host, metrics.model_dump(mode="json"), at)
            )


def run(*statements: Any) -> list[Any]:
    with db.transaction() as connection:
        results = [connection.execute(statement) for statement in statements]
        return [result.all() if result.returns_rows else result.rowcount for result in results]


def now() -> datetime:
    return datetime.now(UTC)


# --- sample, get_metrics --------------------------------------------------------------------


def test_sample_is_stored_and_shared() -> None:
    result = call("sample")
    ((row,),) = run(tables.samples.select())
    assert row.id == result.sample_id
    assert row.host == "here"
    assert abs((now() - row.sampled_at).total_seconds()) < 5
    assert row.metrics["memory_total"] == READING.memory_total
    for field in ("current", "here"):
        text = redis.attempt(lambda r, field=field: r.hget("system:metrics", field))
        assert Metrics.model_validate_json(text).timestamp == result.timestamp


def test_newest_row_serves_when_redis_has_lost_everything() -> None:
    stored = call("sample").timestamp
    forget()
    assert call("get_metrics").metrics.timestamp == stored
    assert call("get_metrics", max_age_s=0).metrics.timestamp > stored


def test_other_hosts_are_served_from_their_rows() -> None:
    insert("there", now() - timedelta(seconds=50), cpu_percent=12.5)
    assert ask("there", 60).cpu_percent == 12.5
    with pytest.raises(Unavailable, match="s old"):
        ask("there", 30)
    with pytest.raises(InvalidInput, match="there"):
        ask("nowhere", 30)


def ask(host: str, max_age_s: float) -> Metrics:
    action = agent.get("get_metrics")
    result = action(action.parse({"host": host, "max_age_s": max_age_s}), context(host="here"))
    assert isinstance(result, sampling.MetricsResult)
    return result.metrics


def test_clock_of_a_host_may_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour ahead of PostgreSQL: a reading from before the call does not pass for a later one."""

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(hours=1)

    ahead = READING.model_copy(update={"timestamp": Ahead.now(UTC) - timedelta(seconds=5)})
    redis.attempt(lambda r: r.hset(sampling.KEY, "here", ahead.model_dump_json()))
    monkeypatch.setattr(sampling, "datetime", Ahead)
    taken: list[Metrics] = []

    def read(host: str) -> Metrics:
        taken.append(READING.model_copy(update={"host": host, "timestamp": Ahead.now(UTC)}))
        return taken[-1]

    monkeypatch.setattr(sampling.meter, "read", read)
    assert call("get_metrics", max_age_s=30).metrics == ahead
    assert call("get_metrics", max_age_s=0).metrics == taken[0]


def work(
    calls: multiprocessing.Queue[datetime | None], results: multiprocessing.Queue[datetime]
) -> None:
    """Serve calls as a pool's process does: one after another."""
    while called_at := calls.get():
        action = agent.get("get_metrics")
        result = action(action.parse({"max_age_s": 0}), context(host="here", created_at=called_at))
        action.dump(result)
        results.put(result.metrics.timestamp)


def test_hundred_calls_at_once_end_within_two_seconds() -> None:
    fork = multiprocessing.get_context("fork")
    calls: Any = fork.Queue()
    results: Any = fork.Queue()
    workers = [fork.Process(target=work, args=(calls, results)) for _ in range(2)]
    for process in workers:
        process.start()
    started_at = time.monotonic()
    for _ in range(100):
        calls.put(now())
    stamps = [results.get(timeout=10) for _ in range(100)]
    took_s = time.monotonic() - started_at
    for _ in workers:
        calls.put(None)
    for process in workers:
        process.join(10)
    assert took_s < 2
    # The clocks of this machine agree, so all but the first few share one measurement.
    assert len(set(stamps)) <= 5


# --- roll-ups and retention -----------------------------------------------------------------


def bucket(hours_ago: int) -> datetime:
    return now().replace(minute=0, second=0, microsecond=0) - timedelta(hours=hours_ago)


def roll(host: str = "here") -> None:
    run(tables.roll_up(host, [(name, number.path) for name, number in NUMBERS.items()]))


def test_roll_up_is_exact_and_repeating_it_changes_nothing() -> None:
    start = bucket(3)
    disk = DiskUsage(total=100, used=40, free=60, percent=40.0, mountpoint="/")
    for index, percent in enumerate([10.0, 20.0, 60.0]):
        at = start + timedelta(seconds=30 * index)
        disks = {"/dev/x": disk.model_copy(update={"used": 40 + index})}
        insert("here", at, cpu_percent=percent, disk_usage=disks)
    insert("here", start + timedelta(minutes=5), cpu_percent=99.0)
    insert("other", start, cpu_percent=1.0)
    insert("here", now(), cpu_percent=50.0)  # its bucket is not complete
    roll()
    (before,) = run(tables.rollups.select().order_by("bucket_at"))
    assert [row.bucket_at for row in before] == [start, start + timedelta(minutes=5)]
    first = before[0]
    assert (first.host, first.step_s, first.samples) == ("here", 300, 3)
    assert first.metrics["cpu_percent"] == [3, 30, 10, 60, 60]
    assert first.metrics["disk_usage.used:/dev/x"] == [3, 41, 40, 42, 42]
    assert "memory_percent" in first.metrics
    roll()
    assert run(tables.rollups.select().order_by("bucket_at")) == [before]


def test_roll_up_catches_up_after_a_pause() -> None:
    for hours in (40, 20, 2):
        insert("here", bucket(hours))
    for _ in range(3):
        roll()
    (rows,) = run(tables.rollups.select().order_by("bucket_at"))
    assert [row.bucket_at for row in rows] == [bucket(40), bucket(20), bucket(2)]


def test_hours_are_joined_exactly_when_they_are_complete() -> None:
    start = bucket(5)
    for minutes, percent in ((0, 10.0), (1, 20.0), (2, 60.0), (30, 90.0), (59, 40.0), (60, 1.0)):
        insert("here", start + timedelta(minutes=minutes), cpu_percent=percent)
    roll()
    roll()
    for _ in range(2):  # the second changes nothing
        run(tables.roll_up_hours("here"))
        (rows,) = run(tables.rollups.select().where(tables.rollups.c.step_s == tables.HOUR_S))
        assert [(row.bucket_at, row.samples) for row in rows] == [(start, 5)]
        assert rows[0].metrics["cpu_percent"] == [5, 44, 10, 90, 40]


def test_each_kind_is_pruned_when_its_time_has_passed() -> None:
    insert("gone", now() - timedelta(hours=49))
    insert("here", now() - timedelta(hours=47))
    for step_s, days in ((300, 31), (300, 29), (3600, 366), (3600, 364)):
        row = {"host": "here", "step_s": step_s, "samples": 1, "metrics": {}}
        run(tables.rollups.insert().values(**row, bucket_at=now() - timedelta(days=days)))
    call("sample")
    (samples, rollups) = run(
        tables.samples.select().order_by("sampled_at"),
        tables.rollups.select().order_by("bucket_at"),
    )
    assert "gone" not in {row.host for row in samples}
    assert len(samples) == 2
    # The roll-ups that the call itself has made of the sample of 47 hours ago stay as well.
    kept = {(row.step_s, (now() - row.bucket_at).days) for row in rollups if not row.metrics}
    assert kept == {(300, 29), (3600, 364)}


# --- get_history ----------------------------------------------------------------------------


@pytest.mark.parametrize(("agg", "value"), [("avg", 30), ("min", 10), ("max", 60), ("last", 60)])
def test_history_of_raw_samples(agg: str, value: float) -> None:
    start = bucket(2)
    for index, percent in enumerate([10.0, 20.0, 60.0]):
        insert("here", start + timedelta(seconds=30 * index), cpu_percent=percent)
    series = call(
        "get_history",
        metric="cpu_percent",
        since=start.isoformat(),
        until=(start + timedelta(hours=1)).isoformat(),
        step_s=600,
        agg=agg,
    )
    assert series.resolution == "raw"
    assert series.unit == "percent"
    assert [(point.at, point.value, point.samples) for point in series.points] == [
        (start, value, 3)
    ]


def test_history_of_a_disk_and_of_nothing() -> None:
    disk = DiskUsage(total=100, used=40, free=60, percent=40.0, mountpoint="/")
    insert("here", now() - timedelta(minutes=5), disk_usage={"/dev/x": disk})
    series = call("get_history", metric="disk_usage.used", device="/dev/x")
    assert [point.value for point in series.points] == [40]
    assert call("get_history", metric="disk_usage.used", device="/dev/y").points == []
    assert call("get_history", metric="cpu_percent", host="nowhere").points == []


def test_old_history_comes_from_roll_ups_and_its_end_from_raw_samples() -> None:
    old = bucket(24 * 10)
    run(
        tables.rollups.insert().values(
            host="here",
            step_s=300,
            bucket_at=old,
            samples=10,
            metrics={"cpu_percent": [10, 30.0, 5.0, 70.0, 31.0]},
        )
    )
    fresh = now() - timedelta(seconds=30)
    insert("here", fresh, cpu_percent=44.0)
    series = call("get_history", metric="cpu_percent", since=old.isoformat(), step_s=3600)
    assert series.resolution == "5min"
    assert [(point.value, point.samples) for point in series.points] == [(30, 10), (44, 1)]


def test_a_step_that_both_sources_know_is_joined() -> None:
    start = bucket(24)
    old = bucket(24 * 10)
    rolled = {"host": "here", "step_s": 300, "samples": 3}
    run(
        tables.rollups.insert().values(
            **rolled, bucket_at=start, metrics={"cpu_percent": [3, 10.0, 5.0, 15.0, 12.0]}
        )
    )
    insert("here", start, cpu_percent=10.0)  # is in the roll-up already, and counts once
    insert("here", start + timedelta(minutes=6), cpu_percent=50.0)
    series = call("get_history", metric="cpu_percent", since=old.isoformat(), step_s=86_400)
    joined = {point.at: (point.value, point.samples) for point in series.points}
    assert list(joined.values()) == [((3 * 10 + 50) / 4, 4)]


# --- forecast, anomalies, advice ------------------------------------------------------------


@pytest.mark.parametrize("hours", [2, 1])
def test_synthetic_fill_is_foreseen_within_ten_percent(hours: int) -> None:
    rate = 10 * MIB
    capacity = 500 * GIB
    rows = []
    for index in range(120):
        age = hours * 3600 * (120 - index) / 120
        used = int(300 * GIB - rate * age) + (index % 7) * 64 * MIB
        disk = DiskUsage(
            total=capacity, used=used, free=capacity - used, percent=60.0, mountpoint="/"
        )
        rows.append((now() - timedelta(seconds=age), {"disk_usage": {"/dev/x": disk}}))
    insert_many(rows)
    result = call("forecast", resource="disk", horizon_s=86_400)
    assert isinstance(result, prediction.Forecast)
    assert result.seconds_until_full == pytest.approx(200 * GIB / rate, rel=0.1)
    assert result.seconds_until_full_low == pytest.approx(200 * GIB / rate, rel=0.1)
    advice = call("recommend", horizon_s=86_400)
    (fills,) = [item for item in advice.suggestions if item.rule == "disk_fills"]
    assert fills.evidence["device"] == "/dev/x"


def test_memory_hog_is_named_within_one_sampling_period() -> None:
    call("sample")
    code = "x = bytearray(b'1') * (400 << 20); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as hog:
        assert hog.stdout is not None
        hog.stdout.readline()
        call("sample")  # the period's own sample is all that is needed
        found = call("detect_anomalies")
        advice = call("recommend")
        hog.communicate(b"\n")
    assert isinstance(found, anomaly.Anomalies)
    assert hog.pid in {item.pid for item in found.anomalies}
    evidence = [item.evidence.get("pid") for item in advice.suggestions]
    assert hog.pid in evidence
    assert advice.source == "rules"


def test_leap_of_a_number_is_named() -> None:
    rows = [
        (now() - timedelta(seconds=30 * age), {"memory_percent": 30.0 + age % 3})
        for age in range(100, 0, -1)
    ]
    insert_many(rows, host="there")
    insert("there", now(), memory_percent=80.0)
    found = call("detect_anomalies", host="there")
    subjects = {item.subject: item for item in found.anomalies}
    assert subjects["memory_percent"].value == 80.0
    assert subjects["memory_percent"].usual == 31.0
    assert found.samples == 100


def test_past_is_thinned_evenly() -> None:
    insert_many([(now() - timedelta(seconds=10 * age), {}) for age in range(359, 0, -1)])
    query = tables.thinned_samples("here", timedelta(hours=1), 60)
    ((*rows,),) = run(query)
    assert 59 <= len(rows) <= 61
    assert rows[0].sampled_at < rows[-1].sampled_at


def test_steps_of_the_past_are_bounded() -> None:
    insert_many([(now() - timedelta(seconds=age), {}) for age in range(300, 0, -1)])
    points = history.values("here", NUMBERS["memory_available"], None, timedelta(hours=1), most=50)
    assert 40 <= len(points) <= 50
    assert points == sorted(points)


def test_long_past_is_read_from_roll_ups_and_its_end_from_raw_samples() -> None:
    start = bucket(8)
    insert_many([(start + timedelta(seconds=30 * i), {"memory_available": i}) for i in range(20)])
    roll()
    insert_many([(now() - timedelta(seconds=age), {"memory_available": 7}) for age in (9, 6, 3)])
    number = NUMBERS["memory_available"]
    points = history.values("here", number, None, timedelta(hours=24), most=50)
    first = (start + timedelta(seconds=150)).timestamp()
    assert points[:2] == [(first, 4.5), (first + 300, 14.5)]
    assert [value for _, value in points[2:]] == [7, 7, 7]


def test_migration_makes_the_tables_that_the_code_declares() -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with db.engine().connect() as connection:
        differences = compare_metadata(
            MigrationContext.configure(connection, opts={"compare_server_default": True}),
            tables.metadata,
        )
    assert [item for item in differences if "hardware" in str(item)] == []
