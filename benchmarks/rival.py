"""Runs peers on stores of their own, each in processes of its own, and gathers what they show."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import httpx

from benchmarks.load import Request, request
from benchmarks.measurement import PeerLine, Samples
from benchmarks.peers.peer import WORKERS, Card, Figures, command
from benchmarks.place import pause_until
from benchmarks.stores import Stores
from tests.conftest import free_port

PEER_WITHIN_S = 600.0
TAIL = 400


class PeerFailed(Exception):
    """A peer is not installed, or did not do what it is to do; the text says which and why."""


@dataclass
class Rival:
    """One peer, and what its rounds have shown; a fault ends its rounds, not the run."""

    card: Card
    figures: list[Figures] = field(default_factory=list)
    fault: str = ""

    def play(self, stores: Stores, tasks: int, trips: int) -> Figures | None:
        """Measure one round on emptied stores; None when it cannot be measured."""
        if self.fault:
            return None
        try:
            found = _play(self.card, stores, min(tasks, self.card.most), trips)
        except PeerFailed as failure:
            self.fault = str(failure)
            return None
        self.figures.append(found)
        return found

    @property
    def title(self) -> str:
        """Its name with its version."""
        name, comma, rest = self.card.title.partition(",")
        return f"{name} {self.card.installed or ''}".strip() + comma + rest

    @property
    def drain(self) -> Samples | None:
        """Tasks worked off a second."""
        return _samples([found.drain_per_s for found in self.figures], "/s")

    @property
    def line(self) -> PeerLine:
        """Its line in the table of peers."""
        return PeerLine(
            self.title,
            self.card.keeps,
            self.card.survives,
            submit=_samples([found.submit_per_s for found in self.figures], "/s"),
            drain=self.drain,
            trip_p50=_samples([trip_ms(found, 50) for found in self.figures], "ms"),
            trip_p99=_samples([trip_ms(found, 99) for found in self.figures], "ms"),
            fault=self.fault,
        )


def trip_ms(found: Figures, percent: float) -> float | None:
    """Return the round trip that so many percent did not exceed; None without trips."""
    if not found.trips_ms:
        return None
    ordered = sorted(found.trips_ms)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _samples(values: list[float | None], unit: str) -> Samples | None:
    known = [value for value in values if value is not None]
    return Samples(known, unit) if known else None


def _play(card: Card, stores: Stores, tasks: int, trips: int) -> Figures:
    if card.installed is None:
        raise PeerFailed("not installed")
    stores.clear()
    output = stores.folder / f"{card.name}.json"
    output.unlink(missing_ok=True)
    asked = ("--tasks", str(tasks), "--trips", str(trips), "--output", str(output))
    line = [sys.executable, "-m", "benchmarks.peers", card.name, *asked]
    with stores.started(line, card.name) as process:
        try:
            code = process.wait(PEER_WITHIN_S)
        except subprocess.TimeoutExpired:
            raise PeerFailed(f"not done in {PEER_WITHIN_S:g} s") from None
    if code or not output.exists():
        log = (stores.folder / f"{card.name}.log").read_text(errors="replace").strip()
        raise PeerFailed(f"failed: {log.splitlines()[-1][-TAIL:] if log else code}")
    return Figures(**json.loads(output.read_text()))


@contextmanager
def by_hand(stores: Stores, *, worker: bool = False) -> Iterator[Request]:
    """Serve what a user would write by hand; give the request that hands over one task."""
    port = free_port()
    serve = command("uvicorn", "benchmarks.peers.by_hand:app", "--port", str(port))
    with ExitStack() as stack:
        if worker:
            stack.enter_context(_celery_worker(stores))
        stack.enter_context(stores.started([*serve, "--log-level", "error"], "by_hand"))
        _await_answer(f"http://127.0.0.1:{port}/openapi.json")
        yield request("POST", f"http://127.0.0.1:{port}/process", {"number": 1})


@contextmanager
def flower(stores: Stores) -> Iterator[Request]:
    """Serve Flower's own task API; give the request that hands over one task."""
    port = free_port()
    app = "benchmarks.peers.celery_redis"
    line = command("celery", "-A", app, "flower", f"--port={port}", "--address=127.0.0.1")
    with stores.started([*line, "--logging=error"], "flower"):
        url = f"http://127.0.0.1:{port}"
        _await_answer(f"{url}/healthcheck")
        yield request("POST", f"{url}/api/task/async-apply/{app}.echo", {"args": [1]})


@contextmanager
def _celery_worker(stores: Stores) -> Iterator[None]:
    app = "benchmarks.peers.celery_redis"
    line = command("celery", "-A", app, "worker", "--concurrency", str(WORKERS))
    with stores.started([*line, "--loglevel", "ERROR"], "celery_worker"):
        yield


def _await_answer(url: str) -> None:
    def answers() -> bool:
        try:
            return httpx.get(url, timeout=2).status_code < 500
        except httpx.HTTPError:
            return False

    pause_until(answers, 30, f"{url} answers", every_s=0.1)
    time.sleep(0.2)
