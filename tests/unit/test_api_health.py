"""What the findings about an agent mean for its health."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sutazai.api.cached import Cached
from sutazai.api.health import assess

FINE = {"broker": "ok", "redis": "ok"}


def worker(**changes: Any) -> dict[str, Any]:
    found = {
        "id": "a@h",
        "host": "h",
        "pid": 1,
        "heartbeat_age_s": 0.5,
        "slots": 2,
        "running": 0,
        "consuming": True,
        "alone": False,
        "idle_s": 1.0,
    }
    return found | changes


def row(**changes: Any) -> SimpleNamespace:
    found = {
        "paused": False,
        "draining": False,
        "depth": 0,
        "oldest_age_s": None,
        "running": 0,
        "workers": [worker()],
        "last_seen_s": 0.5,
        "relay_age_s": 1.0,
        "beat_age_s": 1.0,
    }
    return SimpleNamespace(**found | changes)


def test_healthy_shows_workers_queue_and_checks() -> None:
    report = assess("a", row(), FINE)
    assert (report.status, report.reasons) == ("healthy", [])
    assert report.workers == [
        {"id": "a@h", "host": "h", "pid": 1, "heartbeat_age_s": 0.5, "slots": 2, "running": 0}
    ]
    assert report.queue == {"depth": 0, "oldest_age_s": None, "paused": False, "draining": False}
    assert report.checks == {
        "postgresql": "ok",
        "broker": "ok",
        "redis": "ok",
        "relay_age_s": 1.0,
        "beat_age_s": 1.0,
    }


STUCK = {"oldest_age_s": 61.0, "depth": 1}


@pytest.mark.parametrize(
    ("found", "answers", "status", "word"),
    [
        (None, {}, "unhealthy", "PostgreSQL"),
        (row(workers=None, last_seen_s=None), {}, "unhealthy", "none was ever seen"),
        (row(workers=None, last_seen_s=9.0), {}, "unhealthy", "last seen 9 s ago"),
        (row(workers=[worker(idle_s=61.0)], **STUCK), {}, "unhealthy", "free slots"),
        (row(workers=[worker(idle_s=59.0)], **STUCK), {}, "healthy", ""),
        (row(workers=[worker(idle_s=61.0, alone=True)], **STUCK), {}, "healthy", ""),
        (row(workers=[worker(idle_s=61.0, running=2)], **STUCK), {}, "healthy", ""),
        (row(workers=[worker(idle_s=61.0)], oldest_age_s=59.0), {}, "healthy", ""),
        (row(workers=[worker(idle_s=61.0)], paused=True, **STUCK), {}, "degraded", "paused"),
        (
            row(workers=[worker(idle_s=61.0)], **STUCK),
            {"broker": "does not answer"},
            "degraded",
            "broker",
        ),
        (
            row(workers=[worker(idle_s=61.0, consuming=False)], **STUCK),
            {},
            "degraded",
            "consumer cancelled",
        ),
        (row(), {"redis": "does not answer"}, "degraded", "Redis"),
        (row(), {"redis": "absent"}, "healthy", ""),
        (row(relay_age_s=None), {}, "degraded", "relay"),
        (row(relay_age_s=15.1), {}, "degraded", "silent"),
        (row(beat_age_s=None), {}, "degraded", "Beat"),
        (row(), {"ollama": "absent"}, "healthy", ""),
        (row(), {"ollama": "does not answer"}, "degraded", "ollama"),
    ],
)
def test_assessment(found: Any, answers: dict[str, str], status: str, word: str) -> None:
    report = assess("a", found, FINE | answers)
    assert report.status == status
    assert bool(report.reasons) == (status != "healthy")
    assert word in " ".join(report.reasons)


def test_worst_finding_wins_whatever_the_order() -> None:
    report = assess("a", row(workers=None, paused=True), FINE | {"redis": "does not answer"})
    assert report.status == "unhealthy"
    assert report.reasons[0].startswith("No live worker")
    assert len(report.reasons) == 3


def test_check_is_asked_once_and_not_again_while_fresh_or_under_way() -> None:
    asked = 0
    release = asyncio.Event()

    async def check() -> str:
        nonlocal asked
        asked += 1
        await release.wait()
        return "ok"

    async def run() -> None:
        cached = Cached(check, fresh_s=0.0, within_s=0.01, late="late")
        assert await asyncio.gather(*(cached.get() for _ in range(5))) == ["late"] * 5
        assert await cached.get() == "late"
        assert asked == 1
        release.set()
        assert await cached.get() == "ok"
        assert asked == 1
        kept = Cached(check, fresh_s=60.0, within_s=1.0, late="late")
        assert [await kept.get() for _ in range(3)] == ["ok"] * 3
        assert asked == 2

    asyncio.run(run())
