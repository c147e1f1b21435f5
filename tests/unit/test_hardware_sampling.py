"""Who is served by which reading, and that only one process of a host measures at a time."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sutazai.errors import DatabaseUnavailable, InvalidInput, Unavailable
from sutazai.settings import settings
from sutazai.tasks.hardware_resource_optimizer import get_metrics, sample, sampling, tables
from sutazai.tasks.hardware_resource_optimizer.measurement import Meter
from sutazai.tasks.hardware_resource_optimizer.reading import Metrics
from sutazai.testing import context

READING = Meter().read("here")


class Hash:
    """What is used of Redis: hashes."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], str] = {}
        self.is_away = False

    def hget(self, key: str, field: str) -> str | None:
        return self.values.get((key, field))

    def hset(self, key: str, mapping: dict[str, str]) -> int:
        self.values |= {(key, field): value for field, value in mapping.items()}
        return len(mapping)

    def attempt(self, call: Callable[[Hash], Any]) -> Any:
        return None if self.is_away else call(self)

    def put(self, host: str, age_s: float) -> Metrics:
        metrics = aged(host, age_s)
        self.hset(sampling.KEY, {host: metrics.model_dump_json()})
        return metrics


def aged(host: str, age_s: float) -> Metrics:
    return READING.model_copy(
        update={"host": host, "timestamp": datetime.now(UTC) - timedelta(seconds=age_s)}
    )


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hash:
    """A Redis of our own, no PostgreSQL, and a process that remembers nothing."""
    made = Hash()
    monkeypatch.setattr(sampling.redis, "attempt", made.attempt)
    monkeypatch.setattr(sampling.db, "transaction", away)
    monkeypatch.setattr(sampling, "_memory", sampling._Memory())
    monkeypatch.setattr(settings(), "home", tmp_path)
    return made


@contextmanager
def away() -> Iterator[None]:
    raise DatabaseUnavailable("PostgreSQL does not answer.")
    yield


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Metrics]:
    """Every measurement that is taken."""
    taken: list[Metrics] = []

    def read(host: str) -> Metrics:
        taken.append(aged(host, 0))
        return taken[-1]

    monkeypatch.setattr(sampling.meter, "read", read)
    return taken


def ask(max_age_s: float = 30.0, host: str | None = None, **values: Any) -> sampling.MetricsResult:
    params = get_metrics.parse({"max_age_s": max_age_s, "host": host})
    result = get_metrics(params, context(host="here", **values))
    assert isinstance(result, sampling.MetricsResult)
    assert get_metrics.dump(result)
    return result


def test_young_sample_is_served(shared: Hash, measured: list[Metrics]) -> None:
    stored = shared.put("here", age_s=20)
    result = ask()
    assert result.metrics == stored
    assert 20 <= result.age_s < 22
    assert measured == []


def test_old_sample_is_measured_anew_and_shared(shared: Hash, measured: list[Metrics]) -> None:
    shared.put("here", age_s=40)
    assert ask().metrics == measured[0]
    text = shared.hget(sampling.KEY, "here")
    assert text is not None
    assert Metrics.model_validate_json(text) == measured[0]
    assert shared.hget(sampling.KEY, "current") == text


def test_reading_after_the_call_serves_it_whatever_its_age(
    shared: Hash, measured: list[Metrics]
) -> None:
    called_at = datetime.now(UTC) - timedelta(seconds=3)
    stored = shared.put("here", age_s=1)
    assert ask(0, created_at=called_at).metrics == stored
    assert measured == []
    ask(0, created_at=datetime.now(UTC))
    assert len(measured) == 1


def test_reading_from_the_future_is_not_trusted(shared: Hash, measured: list[Metrics]) -> None:
    shared.put("here", age_s=-3600)
    called_at = datetime.now(UTC) + timedelta(hours=2)
    ask(30, created_at=called_at)
    assert len(measured) == 1


@pytest.mark.parametrize("redis_is_away", [False, True])
def test_calls_at_once_cause_one_measurement(
    shared: Hash, measured: list[Metrics], redis_is_away: bool
) -> None:
    shared.is_away = redis_is_away
    called_at = datetime.now(UTC)
    start = threading.Barrier(8)

    def call(_: int) -> Metrics:
        start.wait(5)
        return ask(0, created_at=called_at).metrics

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(8)))
    assert len(measured) == 1
    assert results == measured * 8


def test_stopped_holder_of_the_turn_does_not_stop_others(
    shared: Hash, measured: list[Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_TURN_S", 0.05)
    with sampling.lock_path().open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        ask(0)
    assert len(measured) == 1


def test_turn_is_kept_by_its_holder(shared: Hash, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        sampling._turn(),
        sampling.lock_path().open("w") as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_without_a_place_for_the_lock_everybody_measures(
    shared: Hash, measured: list[Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "lock_path", lambda: Path("/no/such/folder/lock"))
    ask(0)
    assert len(measured) == 1


def test_garbage_in_redis_is_no_sample(shared: Hash, measured: list[Metrics]) -> None:
    shared.hset(sampling.KEY, {"here": "not JSON"})
    assert ask().metrics == measured[0]


def test_other_host_is_served_but_never_measured(shared: Hash, measured: list[Metrics]) -> None:
    stored = shared.put("there", age_s=10)
    assert ask(host="there").metrics == stored
    with pytest.raises(DatabaseUnavailable):
        ask(host="nowhere")
    assert measured == []


def test_other_host_that_is_silent_is_unavailable(
    shared: Hash, measured: list[Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_stored", lambda host: (aged(host, 300), 300.0))
    with pytest.raises(Unavailable, match="300 s old"):
        ask(host="there")


@pytest.mark.parametrize("max_age_s", [-1, 1e9, "young"])
def test_bad_age_is_refused(max_age_s: object) -> None:
    with pytest.raises(InvalidInput, match="max_age_s"):
        get_metrics.parse({"max_age_s": max_age_s})


def verbs(statements: list[Any]) -> list[str]:
    return [" ".join(str(statement).split()[:3]) for statement in statements]


def test_sample_is_written(shared: Hash, measured: list[Metrics]) -> None:
    seen = context(host="here")
    result = sample(sample.parse({}), seen)
    assert isinstance(result, sampling.SampleResult)
    assert verbs(seen.written)[0] == "INSERT INTO hardware_samples"
    values = seen.written[0].compile().params
    assert values["id"] == result.sample_id
    assert values["metrics"] == measured[0].model_dump(mode="json")
    assert shared.hget(sampling.KEY, "current") == measured[0].model_dump_json()


def test_upkeep_is_done_once_a_bucket(shared: Hash) -> None:
    def written(now_s: float) -> list[str]:
        seen = context(host="here")
        sampling.keep_up(seen, now_s)
        return verbs(seen.written)

    start = 1_800_000_000.0 + tables.LATE_S  # the first second of an hour is late enough
    fine = ["INSERT INTO hardware_rollups", "DELETE FROM hardware_samples"]
    hourly = [
        "INSERT INTO hardware_rollups",
        "DELETE FROM hardware_rollups",
        "DELETE FROM hardware_rollups",
        "DELETE FROM hardware_plans",
        "DELETE FROM hardware_audit",
    ]
    assert written(start) == [*fine, *hourly]
    assert written(start + 30) == []
    assert written(start + tables.FIVE_MINUTES_S) == fine
    assert written(start + tables.HOUR_S) == [*fine, *hourly]


def test_health_tells_when_sampling_has_stopped(shared: Hash) -> None:
    assert sampling.check_health() == "absent"
    shared.hset(sampling.KEY, {"current": aged("here", 10).model_dump_json()})
    assert sampling.check_health() == "ok"
    shared.hset(sampling.KEY, {"current": aged("here", 600).model_dump_json()})
    assert sampling.check_health() == "the newest sample is 600 s old"
