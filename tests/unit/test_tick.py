"""When schedules tick: periods, cron expressions, summer time, catching up, jitter."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from celery.schedules import crontab
from celery.schedules import schedule as interval

from sutazai.errors import InvalidInput, SutazaiError
from sutazai.scheduler import configured
from sutazai.tick import MAX_COUNTED, ON_TIME_S, Tick, Timing, jitter


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


NOW = at("2026-03-01 12:00:10")


def ticks(timing: Timing, since: str, until: str) -> list[str]:
    due = timing.due(at(since), at(until), 1000)
    return [f"{tick.at:%m-%d %H:%M}" for tick in due.ticks]


def test_periods_tick_at_exact_multiples() -> None:
    timing = Timing(every_s=0.1 * 11)
    found = [timing.after(NOW)]
    for _ in range(5):
        found.append(timing.after(found[-1]))
    assert {b - a for a, b in pairwise(found)} == {timedelta(seconds=1.1)}
    assert timing.latest(found[3]) == found[3]
    assert timing.latest(found[3] - timedelta(microseconds=1)) == found[2]


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        # On 29 March 2026 Berlin leaps from 2:00 (1:00 UTC) to 3:00; what is leapt over comes then.
        ("30 2 * * *", ["03-28 01:30", "03-29 01:00", "03-30 00:30"]),
        ("0,30 2,3 29 3 *", ["03-29 01:00", "03-29 01:30"]),
        ("0 12 * * *", ["03-28 11:00", "03-29 10:00", "03-30 10:00"]),
    ],
)
def test_cron_when_summer_time_begins(cron: str, expected: list[str]) -> None:
    timing = Timing(cron=cron, time_zone="Europe/Berlin")
    assert ticks(timing, "2026-03-28 00:00", "2026-03-30 12:00") == expected


def test_cron_when_summer_time_ends() -> None:
    # On 25 October 2026 the hour from 2:00 to 3:00 comes twice, at 0:00 and 1:00 UTC.
    daily = Timing(cron="30 2 * * *", time_zone="Europe/Berlin")
    assert ticks(daily, "2026-10-24 12:00", "2026-10-26 12:00") == ["10-25 00:30", "10-26 01:30"]
    for taken in ("2026-10-25 00:30", "2026-10-25 01:15", "2026-10-25 01:30"):
        assert daily.after(at(taken)) == at("2026-10-26 01:30")
    often = Timing(cron="*/30 * * * *", time_zone="Europe/Berlin")
    assert ticks(often, "2026-10-25 00:00", "2026-10-25 02:00") == [
        "10-25 00:00",
        "10-25 00:30",
        "10-25 01:00",
        "10-25 01:30",
        "10-25 02:00",
    ]


def test_a_tick_does_not_depend_on_when_it_is_looked_for() -> None:
    timing = Timing(cron="15 2,3 * * *", time_zone="America/New_York")
    whole = timing.due(at("2026-01-01 00:00"), at("2027-01-01 00:00"), 1000)
    assert len(whole.ticks) == 730  # on 8 March at 3:00 instead of 2:15, and at 3:15
    found, instant = [], at("2025-12-31 23:59")
    while (instant := timing.after(instant)) <= at("2027-01-01 00:00"):
        found.append(instant)
    assert found == [tick.at for tick in whole.ticks]


@pytest.mark.parametrize(
    "timing", [Timing(every_s=60), Timing(cron="* * * * *")], ids=["period", "cron"]
)
def test_what_is_taken_after_an_outage(timing: Timing) -> None:
    first = at("2026-03-01 11:50:00")
    for catch_up, taken, missed in ((1, 1, 10), (3, 3, 8), (50, 11, 0), (0, 1, 10)):
        due = timing.due(first, NOW, catch_up)
        assert (len(due.ticks), due.missed) == (taken, missed)
        assert due.ticks[-1] == Tick(at("2026-03-01 12:00:00"), at("2026-03-01 12:01:00"))
        assert due.next_at == at("2026-03-01 12:01:00")
    late = at("2026-03-01 12:00:00") + timedelta(seconds=ON_TIME_S + 1)
    due = timing.due(first, late, 0)
    assert (due.ticks, due.missed, due.next_at) == ([], 11, at("2026-03-01 12:01:00"))


def test_a_very_long_outage_is_counted_up_to_a_bound() -> None:
    due = Timing(cron="* * * * *").due(at("2020-01-01 00:00"), NOW, 2)
    assert [tick.at.minute for tick in due.ticks] == [59, 0]
    assert due.missed == MAX_COUNTED - 2


@pytest.mark.parametrize(
    "timing",
    [
        Timing(),
        Timing(every_s=5, cron="* * * * *"),
        Timing(cron="61 * * * *"),
        Timing(cron="* * * * * *"),
        Timing(cron="@daily"),
        Timing(cron=""),
        Timing(cron="0 0 30 2 *"),
        Timing(cron="0 0 * * *", time_zone="Mars/Olympus"),
        Timing(cron="0 0 * * *", time_zone="../../etc/passwd"),
        Timing(cron="0 0 * * *", time_zone="Europe"),
        Timing(cron="0 0 * * *", time_zone=""),
        Timing(cron="0 0 * * 1#6"),
        Timing(cron="- - - - -"),
        Timing(cron="*/0 * * * *"),
        Timing(cron="L * * * *"),
        Timing(cron="¹ * * * *"),
        Timing(cron="0 0 * * ²L"),
    ],
    ids=repr,
)
def test_what_is_no_timing_is_refused_with_its_field(timing: Timing) -> None:
    with pytest.raises(InvalidInput) as refused:
        timing.check()
    assert refused.value.details[0]["field"] in ("every_s", "cron", "time_zone")


def test_jitter_is_the_same_for_every_beat_and_ends_before_the_next_tick() -> None:
    start = at("2026-03-01 12:00")
    made = [
        jitter("s", Tick(start + timedelta(seconds=n), start + timedelta(seconds=n + 1)), 3600)
        for n in range(50)
    ]
    assert made[0] == jitter("s", Tick(start, start + timedelta(seconds=1)), 3600)
    assert all(timedelta() <= one < timedelta(seconds=1) for one in made)
    assert len(set(made)) == 50


# --- Celery's entries -----------------------------------------------------------------------

TASK = "task-assignment-coordinator.describe"


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (30, (30, None)),
        (timedelta(minutes=5), (300, None)),
        (interval(10.0), (10, None)),
        (crontab(), (None, "* * * * *")),
        (crontab(minute="*/20", hour="7"), (None, "0,20,40 7 * * *")),
        (crontab(minute=0, hour=0, day_of_week="mon-fri"), (None, "0 0 * * 1,2,3,4,5")),
        (crontab(0, 0, day_of_month="1,15"), (None, "0 0 1,15 * *")),
    ],
)
def test_entries_of_celery_become_rows(when: Any, expected: tuple[Any, Any]) -> None:
    row = configured("a", {"task": TASK, "schedule": when}, "Europe/Berlin", NOW)
    assert (row["every_s"], row["cron"]) == expected
    assert (row["source"], row["next_tick_at"] > NOW) == ("celeryconfig", True)
    assert row["time_zone"] == ("Europe/Berlin" if row["cron"] else "UTC")
    assert "enabled" not in row


@pytest.mark.parametrize(
    "entry",
    [
        {"task": TASK, "schedule": 30, "args": (1,)},
        {"task": TASK, "schedule": 30, "kwargs": {"no": 1}},
        {"task": TASK, "schedule": 30, "options": {"queue": "x"}},
        {"task": TASK, "schedule": 0.5},
        {"task": TASK, "schedule": "daily"},
        {"task": TASK, "schedule": crontab(0, 0, day_of_month=13, day_of_week="fri")},
        {"task": "nobody.describe", "schedule": 30},
        {"task": "task-assignment-coordinator.nothing", "schedule": 30},
        {"schedule": 30},
        {"task": TASK},
    ],
)
def test_entries_that_cannot_be_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(SutazaiError):
        configured("a", entry, "UTC", NOW)
    with pytest.raises(InvalidInput):
        configured("not a name", {"task": TASK, "schedule": 30}, "UTC", NOW)


def test_time_zones_are_known_on_a_machine_that_has_none() -> None:
    code = "from sutazai.tick import Timing; Timing(None, '0 3 * * *', 'Europe/Berlin').check()"
    env = {"PYTHONTZPATH": "", "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
