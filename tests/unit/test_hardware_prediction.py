"""Trends, scores, anomalies and advice from given samples."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sutazai.errors import InvalidInput
from sutazai.tasks.hardware_resource_optimizer import (
    advice,
    anomaly,
    forecast,
    history,
    prediction,
    sampling,
)
from sutazai.tasks.hardware_resource_optimizer.anomaly import Past
from sutazai.tasks.hardware_resource_optimizer.measurement import Meter
from sutazai.tasks.hardware_resource_optimizer.reading import (
    DiskUsage,
    Metrics,
    Pressure,
    ProcessUsage,
    Psi,
    Stall,
)
from sutazai.testing import context

GIB = 1 << 30
MIB = 1 << 20
READING = Meter().read("here")


# --- trends ---------------------------------------------------------------------------------


def test_trend_of_a_line_is_the_line() -> None:
    trend = prediction.fit([(float(x), 3.0 * x + 7) for x in range(20)])
    assert trend.slope == pytest.approx(3)
    assert trend.intercept == pytest.approx(7)
    assert trend.slope_low == pytest.approx(3)
    assert trend.slope_high == pytest.approx(3)


def test_outliers_do_not_bend_the_trend() -> None:
    points = [(float(x), 3.0 * x) for x in range(40)]
    for index in range(0, 40, 5):
        points[index] = (points[index][0], 1e6)
    assert prediction.fit(points).slope == pytest.approx(3, rel=0.05)


def test_band_holds_the_true_slope_about_as_often_as_it_says() -> None:
    chance = random.Random(11)
    hits = 0
    for _ in range(100):
        points = [(float(x), 2.0 * x + chance.gauss(0, 10)) for x in range(30)]
        trend = prediction.fit(points)
        assert trend.slope_low <= trend.slope <= trend.slope_high
        hits += trend.slope_low <= 2.0 <= trend.slope_high
    assert 88 <= hits <= 100


def test_score_is_the_modified_z_score() -> None:
    past = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert prediction.score(3, past, 0.1) == 0
    assert prediction.score(13, past, 0.1) == pytest.approx(6.745)
    assert prediction.score(5, [4.0] * 9, 0.5) == pytest.approx(0.6745 * 2)


def predict(
    monkeypatch: pytest.MonkeyPatch, points: Sequence[tuple[float, float]], **params: Any
) -> prediction.Forecast:
    used = int(points[-1][1]) if points else 0
    disk = {"total": 1100 * GIB, "used": used, "free": 1000 * GIB - used, "percent": 50.0}
    monkeypatch.setattr(sampling, "stored", lambda host: {"disk_usage": {"/dev/x": disk}})
    monkeypatch.setattr(history, "values", lambda *arguments: list(points))
    result = forecast(forecast.parse(params), context(host="here"))
    assert isinstance(result, prediction.Forecast)
    assert forecast.dump(result)
    return result


def test_fill_is_foreseen_within_ten_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(5)
    now = time.time()
    rate = 500 * GIB / 86_400  # half of the disk a day
    points = [
        (now - age, 500 * GIB - rate * age + chance.gauss(0, 0.5 * GIB))
        for age in range(6 * 3600, 0, -120)
    ]
    points[50] = (points[50][0], 990.0 * GIB)  # somebody's large temporary file
    result = predict(monkeypatch, points, horizon_s=7 * 86_400)
    assert result.device == "/dev/x"
    assert result.slope_bytes_per_s == pytest.approx(rate, rel=0.1)
    assert result.seconds_until_full == pytest.approx(86_400, rel=0.1)
    assert result.seconds_until_full_low is not None
    assert result.seconds_until_full_high is not None
    assert result.seconds_until_full_low <= result.seconds_until_full
    assert result.seconds_until_full <= result.seconds_until_full_high
    assert result.full_at is not None
    assert result.full_at.timestamp() == pytest.approx(now + 86_400, abs=8640)
    assert result.used_bytes_at_horizon == 1000 * GIB
    # The blocks that are reserved for the superuser do not count.
    assert result.capacity_bytes == 1000 * GIB


def test_shrinking_use_never_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    points = [(now - age, 500 * GIB + age * MIB) for age in range(3600, 0, -60)]
    result = predict(monkeypatch, points)
    assert result.seconds_until_full is None
    assert result.full_at is None


def test_beyond_the_horizon_no_date_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    points = [(now - age, 500 * GIB - age * MIB) for age in range(3600, 0, -60)]
    result = predict(monkeypatch, points, horizon_s=3600)
    assert result.seconds_until_full == pytest.approx(500 * GIB / MIB, rel=0.01)
    assert result.full_at is None


def test_few_points_make_no_trend(monkeypatch: pytest.MonkeyPatch) -> None:
    result = predict(monkeypatch, [(time.time(), 1.0)] * 4)
    assert result.slope_bytes_per_s is None
    assert "4 points" in result.message


def test_unknown_disk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="/dev/x"):
        predict(monkeypatch, [], device="/dev/y")


# --- anomalies ------------------------------------------------------------------------------


def usage(pid: int, mib: int, started_at: float = 0.0, name: str = "p") -> ProcessUsage:
    return ProcessUsage(
        pid=pid,
        name=name,
        user="me",
        cpu_percent=1.0,
        memory_bytes=mib * MIB,
        memory_percent=1.0,
        nice=0,
        started_at=started_at,
    )


def past_of(*metrics: Metrics) -> list[Past]:
    """Samples 30 s apart, the last of them 30 s ago."""
    now = READING.timestamp
    return [
        Past(now - timedelta(seconds=30 * (len(metrics) - index)), item.model_dump())
        for index, item in enumerate(metrics)
    ]


def with_(**values: Any) -> Metrics:
    return READING.model_copy(update=values)


def test_number_far_from_its_past_is_named() -> None:
    chance = random.Random(3)
    past = past_of(*(with_(memory_percent=40 + chance.uniform(-1, 1)) for _ in range(60)))
    (found,) = [
        item
        for item in anomaly.unusual_numbers(with_(memory_percent=70.0), past, 3.5)
        if item.subject == "memory_percent"
    ]
    assert found.usual == pytest.approx(40, abs=1)
    assert found.score is not None
    assert found.score > 3.5
    assert found.evidence["samples"] == 60
    assert found.evidence["at"] == READING.timestamp.isoformat()


@pytest.mark.parametrize("value", [40.5, 43.0])
def test_small_change_of_a_constant_is_not_named(value: float) -> None:
    past = past_of(*[with_(memory_percent=40.0)] * 60)
    found = anomaly.unusual_numbers(with_(memory_percent=value), past, 3.5)
    assert "memory_percent" not in {item.subject for item in found}


def test_without_a_past_nothing_is_unusual() -> None:
    past = past_of(*[with_(memory_percent=1.0)] * (anomaly.FEWEST_SAMPLES - 1))
    assert anomaly.unusual_numbers(with_(memory_percent=99.0), past, 3.5) == []


def grown(now: Metrics, past: list[Past]) -> list[int | None]:
    found = anomaly.grown_processes(now, past, timedelta(hours=1), 128 * MIB)
    return [item.pid for item in found]


def test_process_that_grew_is_named_by_its_pid() -> None:
    past = past_of(with_(top_processes=[usage(1, 500), usage(2, 50)]))
    now = with_(top_processes=[usage(2, 700), usage(1, 510)])
    assert grown(now, past) == [2]


def test_unlisted_process_was_at_most_as_large_as_the_last_listed() -> None:
    past = past_of(with_(top_processes=[usage(pid, 100) for pid in range(6)]))
    now = with_(top_processes=[usage(9, 300), usage(8, 220)])
    assert grown(now, past) == [9]


def test_new_process_grew_from_nothing() -> None:
    started_at = (READING.timestamp - timedelta(seconds=10)).timestamp()
    now = with_(top_processes=[usage(7, 300, started_at)])
    assert grown(now, past_of(with_(top_processes=[usage(1, 400)]))) == [7]
    assert grown(now, []) == [7]


def test_pid_that_was_used_again_is_another_process() -> None:
    recently = (READING.timestamp - timedelta(seconds=10)).timestamp()
    past = past_of(with_(top_processes=[usage(7, 300, started_at=0.0)]))
    assert grown(with_(top_processes=[usage(7, 310, recently)]), past) == [7]


def test_steady_process_is_not_named() -> None:
    past = past_of(with_(top_processes=[usage(1, 4000)]))
    assert grown(with_(top_processes=[usage(1, 4010)]), past) == []


# --- advice ---------------------------------------------------------------------------------


def stalled(percent: float) -> Pressure:
    stall = Stall(avg10=percent, avg60=percent, avg300=percent, total_us=1)
    return Pressure(some=stall, full=stall)


def quiet(**values: Any) -> Metrics:
    calm = {"psi": Psi(), "cpu_percent": 1.0, "memory_percent": 1.0, "load": {"avg5": 0}}
    load = READING.load.model_copy(update={"avg5": 0.0})
    return with_(**{**calm, "load": load, **values})


@pytest.mark.parametrize(
    ("adviser", "values", "rule", "severity"),
    [
        (advice.advise_memory, {"memory_percent": 85.0}, "memory_high", "warning"),
        (advice.advise_memory, {"memory_percent": 97.0}, "memory_high", "critical"),
        (advice.advise_memory, {"psi": Psi(memory=stalled(50))}, "memory_stalls", "critical"),
        (advice.advise_cpu, {"cpu_percent": 90.0}, "cpu_high", "warning"),
        (advice.advise_cpu, {"psi": Psi(cpu=stalled(50))}, "cpu_stalls", "critical"),
        (
            advice.advise_disk,
            {
                "disk_usage": {
                    "/dev/x": DiskUsage(total=9, used=9, free=0, percent=99.0, mountpoint="/")
                }
            },
            "disk_high",
            "critical",
        ),
    ],
)
def test_rule_speaks_up_with_evidence(
    adviser: Any, values: dict[str, Any], rule: str, severity: str
) -> None:
    assert [item.rule for item in adviser(quiet(), 80.0)] == []
    (found,) = adviser(quiet(**values), 80.0)
    assert (found.rule, found.severity) == (rule, severity)
    assert found.evidence["at"] == READING.timestamp.isoformat()


def test_advice_names_the_processes_behind_it() -> None:
    now = quiet(memory_percent=90.0, top_processes=[usage(4711, 900, name="hog")])
    (found,) = advice.advise_memory(now, 80.0)
    assert "hog (pid 4711)" in found.message


# --- history --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"metric": "no_such"}, "no_such"),
        ({"metric": "disk_usage.used"}, "device"),
        ({"metric": "cpu_percent", "since": "2026-01-02T00:00:00Z",
          "until": "2026-01-01T00:00:00Z"}, "before"),
        ({"metric": "cpu_percent", "step_s": 1,
          "since": (datetime.now(UTC) - timedelta(hours=3)).isoformat()}, "5000"),
    ],
)  # fmt: skip
def test_senseless_questions_are_refused(params: dict[str, Any], message: str) -> None:
    from sutazai.tasks.hardware_resource_optimizer import get_history

    with pytest.raises(InvalidInput, match=message):
        get_history(get_history.parse(params), context())


def test_known_metrics_stand_in_the_schema() -> None:
    from sutazai.tasks.hardware_resource_optimizer import get_history

    names = get_history.params_schema["properties"]["metric"]["enum"]
    assert "psi.memory.some.avg60" in names
