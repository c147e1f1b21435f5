"""What a peer is, and how every one of them is measured."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

BIN = Path(sys.executable).parent
WORKERS = 2
"""Processes that work; as many as the agent has slots."""

DRAIN_WITHIN_S = 300.0
WARM_TRIPS = 50


@dataclass(frozen=True)
class Figures:
    """What one run of a peer has shown; None: not asked for."""

    submit_per_s: float | None
    drain_per_s: float | None
    trips_ms: Sequence[float]


class Peer(ABC):
    """One peer; made in the process that submits."""

    @abstractmethod
    def submit(self, count: int) -> None:
        """Hand over so many tasks, one by one."""

    @abstractmethod
    def done(self) -> int:
        """Count the results that are kept."""

    @abstractmethod
    def trip(self) -> None:
        """Hand over one task and wait for its result."""

    @abstractmethod
    def commands(self) -> Sequence[Sequence[str]]:
        """Return the worker processes to start, with two processes that work in all."""


@dataclass(frozen=True)
class Card:
    """What is known of a peer without importing it."""

    name: str
    title: str
    keeps: str
    survives: str
    """Whether tasks survive kill -9 of a worker, and the loss of Redis."""

    distributions: tuple[str, ...]
    """What must be installed; the first one's version is the peer's."""

    most: int = 10_000
    """More tasks would only take longer."""

    module: ClassVar[str] = "benchmarks.peers"

    @property
    def installed(self) -> str | None:
        """Return the version that is installed."""
        try:
            versions = [version(name) for name in self.distributions]
            return versions[0]
        except PackageNotFoundError:
            return None

    def make(self) -> Peer:
        """Import its application and return the peer."""
        module = importlib.import_module(f"{self.module}.{self.name}")
        made: Peer = module.Measured()
        return made


CARDS = [
    Card("celery_redis", "Celery, as documented", "Redis", "no, no", ("celery",)),
    Card("celery_postgresql", "Celery, as documented", "PostgreSQL", "no, no", ("celery",)),
    Card(
        "celery_durable",
        "Celery, acks_late + reject_on_worker_lost + track_started",
        "PostgreSQL",
        "yes, no",
        ("celery",),
    ),
    Card("dramatiq_redis", "Dramatiq", "Redis", "yes, no", ("dramatiq",)),
    Card("taskiq_redis", "Taskiq, streams", "Redis", "partly, no", ("taskiq", "taskiq-redis")),
    Card("arq_redis", "arq", "Redis", "yes, no", ("arq",), most=3000),
    Card("huey_redis", "Huey", "Redis", "no, no", ("huey",)),
    Card("rq_redis", "RQ", "Redis", "partly, no", ("rq",), most=1000),
    Card(
        "procrastinate_postgresql",
        "procrastinate",
        "PostgreSQL",
        "yes, has no Redis",
        ("procrastinate",),
        most=5000,
    ),
]


def command(program: str, *arguments: str) -> list[str]:
    """Return a command of this environment."""
    return [str(BIN / program), *arguments]


def measure(peer: Peer, tasks: int, trips: int) -> Figures:
    """Submit a backlog, start the workers, time the drain; then time round trips at idle."""
    submit_per_s = drain_per_s = None
    if tasks:
        began = time.perf_counter()
        peer.submit(tasks)
        submit_per_s = tasks / (time.perf_counter() - began)
    with _working(peer):
        if tasks:
            drain_per_s = _drain(peer, tasks)
        times = []
        for number in range(WARM_TRIPS + trips if trips else 0):
            began = time.perf_counter()
            peer.trip()
            if number >= WARM_TRIPS:
                times.append(1000 * (time.perf_counter() - began))
    return Figures(submit_per_s, drain_per_s, times)


def _drain(peer: Peer, tasks: int) -> float:
    deadline = time.monotonic() + DRAIN_WITHIN_S
    while not (first := peer.done()):
        _check(deadline, 0, tasks)
        time.sleep(0.01)
    began = time.perf_counter()
    while (done := peer.done()) < tasks:
        _check(deadline, done, tasks)
        time.sleep(0.02)
    return (tasks - first) / (time.perf_counter() - began)


def _check(deadline: float, done: int, tasks: int) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{done} of {tasks} tasks were done in {DRAIN_WITHIN_S:g} s")


@contextmanager
def _working(peer: Peer) -> Iterator[None]:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        # Its output stands in the log of this process.
        processes.extend(subprocess.Popen(line) for line in peer.commands())
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait()
