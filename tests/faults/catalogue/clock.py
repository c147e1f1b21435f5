"""Hosts whose clocks are wrong."""

from __future__ import annotations

import atexit
import contextlib
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
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
LONG_S = 8.0
"""A relay judges leases when it has run for ten seconds, which this one then has."""

SOURCE = Path(__file__).parents[1] / "clock.c"


def _missing() -> str:
    return "" if shutil.which("cc") else "a C compiler"


@cache
def _library() -> Path:
    """Compile the wrong clock, once a process."""
    folder = Path(tempfile.mkdtemp(prefix="sutazai-clock-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / "clock.so"
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return library


@fault("clocks that are an hour ahead or behind", missing=_missing)
def shift_clocks(place: Place, chance: random.Random) -> None:
    off_s = [OFF_S, OFF_S, -OFF_S, -OFF_S]
    chance.shuffle(off_s)
    url = f"http://127.0.0.1:{(port := free_port())}"
    commands = (("api", AGENT), ("worker", AGENT), ("relay",), ("beat",))
    with ExitStack() as stack:
        for command, each_s in zip(commands, off_s, strict=True):
            stack.enter_context(_running(place, command, each_s, port))
        _await_front(url, off_s[0])
        stack.enter_context(_without(place, NORMAL))
        _use(place, url)


@contextmanager
def _running(place: Place, command: Sequence[str], off_s: int, port: int) -> Iterator[None]:
    """Run a program of ours under another clock."""
    env = place.system.env | {
        "LD_PRELOAD": str(_library()),
        "CLOCK_OFF_S": str(off_s),
        "SUTAZAI_PORTS": f"{AGENT}={port}",
    }
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([BIN / "sutazai", *command], env=env, stdout=quiet, stderr=quiet)
    try:
        yield
        assert process.poll() is None, f"{command} has ended"
    finally:
        process.terminate()
        process.wait(45)


def _await_front(url: str, off_s: int) -> None:
    """Wait until a front answers, and make sure that its clock is as wrong as it is meant to be."""

    def ask() -> Any:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{url}/health", timeout=5).json()
        return None

    health = until(ask, 60, "the other front answers")
    shown = datetime.fromisoformat(health["timestamp"])
    assert abs((shown - datetime.now(UTC)).total_seconds() - off_s) < 60


@contextmanager
def _without(place: Place, names: Sequence[str]) -> Iterator[None]:
    """Stop programs that have the right time while entered, so that the others do all the work."""
    supervisor = Supervisor(place.system.home)
    until(lambda: place.value(_RELAYS) >= 2, 60, "the other relay serves")
    until(lambda: place.value(_BEATS) >= 2, 60, "the other Beat serves")
    until(lambda: place.value(_WORKERS) >= 2, 60, "the other worker serves")
    try:
        for name in names:
            supervisor.stop(name)
        yield
    finally:
        supervisor.start_all()


_LATELY = "heartbeat_at > now() - interval '10 seconds'"
_RELAYS = f"SELECT count(*) FROM services WHERE kind = 'relay' AND {_LATELY}"
_BEATS = f"SELECT count(*) FROM services WHERE kind = 'beat' AND {_LATELY}"
_WORKERS = f"SELECT count(*) FROM workers WHERE stopped_at IS NULL AND {_LATELY}"


def _use(place: Place, other: str) -> None:
    """Check that leases, deadlines, keys and delays are judged by the database's clock."""
    now = place.value("SELECT now()")
    options = {
        "run_at": (now + timedelta(seconds=2)).isoformat(),
        "deadline_at": (now + timedelta(seconds=60)).isoformat(),
    }
    key = str(uuid4())
    delayed = {_accept(url, key, 0.0, options) for url in (other, place.url, other)}
    assert len(delayed) == 1, "a key has two tasks"
    for task_id in (*delayed, _accept(other, str(uuid4()), LONG_S, {})):
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

    return str(until(post, 30, "a front accepts"))
