"""Hosts whose clocks are wrong."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from sutazai.embedded import Supervisor
from tests.acceptance.conftest import BIN
from tests.conftest import free_port
from tests.faults.fault import fault
from tests.faults.place import AGENT, WORKER, Place, until

OFF_S = 3600
NORMAL = (WORKER, "relay", "beat")
LONGER_THAN_STEADY_S = 11.0
"""A relay judges leases only when it has run for ten seconds."""


def _library() -> Path | None:
    return next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


def _missing() -> str:
    return "" if _library() else "libfaketime (Debian's package faketime)"


@fault("two hosts whose clocks are an hour ahead and an hour behind", missing=_missing)
def shift_clocks(place: Place, _: random.Random) -> None:
    with ExitStack() as stack:
        fronts = [stack.enter_context(_host(place, off_s)) for off_s in (OFF_S, -OFF_S)]
        for url, off_s in zip(fronts, (OFF_S, -OFF_S), strict=True):
            _await_host(url, off_s)
        stack.enter_context(_without(place, NORMAL))
        _use(place, fronts)


@contextmanager
def _host(place: Place, off_s: int) -> Iterator[str]:
    """Run worker, front, relay and Beat under another clock; yield the front's address."""
    port = free_port()
    env = place.system.env | {
        "LD_PRELOAD": str(_library()),
        "FAKETIME": f"{off_s:+d}",
        # A wrong clock of a host is that of the wall; the monotonic one and files stay right.
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
        "SUTAZAI_PORTS": f"{AGENT}={port}",
    }
    commands = (("worker", AGENT), ("api", AGENT), ("relay",), ("beat",))
    running = [
        subprocess.Popen(
            [BIN / "sutazai", *command],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for command in commands
    ]
    try:
        yield f"http://127.0.0.1:{port}"
        assert [process.poll() for process in running] == [None] * len(running)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(45)


def _await_host(url: str, off_s: int) -> None:
    """Wait until a front answers, and make sure that its clock is as wrong as it is meant to be."""

    def ask() -> Any:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{url}/health", timeout=5).json()
        return None

    health = until(ask, 60, "the front of the other host answers")
    shown = datetime.fromisoformat(health["timestamp"])
    assert abs((shown - datetime.now(UTC)).total_seconds() - off_s) < 60


@contextmanager
def _without(place: Place, names: Sequence[str]) -> Iterator[None]:
    """Stop programs that have the right time while entered, so that the others do all the work."""
    supervisor = Supervisor(place.system.home)
    until(
        lambda: place.value(_SERVING) >= 3 * len({"relay", "beat"}),
        60,
        "the relays and Beats of the other hosts serve",
    )
    until(lambda: place.value(_WORKERS) >= 3, 60, "the workers of the other hosts serve")
    try:
        for name in names:
            supervisor.stop(name)
        yield
    finally:
        for name in names:
            supervisor.start(name)


_SERVING = "SELECT count(*) FROM services WHERE heartbeat_at > now() - interval '10 seconds'"
_WORKERS = (
    "SELECT count(*) FROM workers WHERE stopped_at IS NULL "
    "AND heartbeat_at > now() - interval '10 seconds'"
)


def _use(place: Place, fronts: Sequence[str]) -> None:
    """Check that leases, deadlines, keys and delays are judged by the database's clock."""
    now = place.value("SELECT now()")
    options = {
        "run_at": (now + timedelta(seconds=2)).isoformat(),
        "deadline_at": (now + timedelta(seconds=60)).isoformat(),
    }
    delayed: list[str] = []
    long: list[str] = []
    for url in fronts:
        key = str(uuid4())
        ids = {_accept(front, key, 0.0, options) for front in (url, *fronts)}
        assert len(ids) == 1, "a key has two tasks"
        delayed += ids
        long.append(_accept(url, str(uuid4()), LONGER_THAN_STEADY_S, {}))
    for task_id in (*delayed, *long):
        place.await_state(task_id, "succeeded", 60)
        assert place.value(_WAS_RIGHT, task_id), f"{task_id} was not judged by the right clock"


_WAS_RIGHT = "SELECT attempt = 1 AND started_at >= run_at FROM tasks WHERE task_id = %s"


def _accept(url: str, key: str, seconds: float, options: dict[str, str]) -> str:
    body = {"action": "work", "params": {"seconds": seconds}, "options": options}
    headers = {"Idempotency-Key": key}

    def post() -> Any:
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.post(f"{url}/tasks", json=body, headers=headers, timeout=10)
            if answer.status_code in (200, 202):
                return answer.json()["task_id"]
            assert answer.status_code == 503, answer.text
        return None

    return str(until(post, 30, "the front of another host accepts"))
