"""The system that is measured: a `sutazai up` of its own, with an agent that does nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import redis

from benchmarks.load import Request, fire, request
from benchmarks.stores import superuser_url
from sutazai.embedded import Supervisor
from sutazai.settings import read_env_file
from tests.acceptance.conftest import AGENTS, STORES, System, free_offset, start, stop

AGENT = "echo"
PORT = 8192
WORKER = f"worker-{AGENT}"
BATCH = 1000


@dataclass(frozen=True)
class Drain:
    """How a backlog was worked off, by PostgreSQL's clock."""

    tasks: int
    seconds: float
    """From the moment the queue was resumed until the last task had finished."""

    working_s: float
    """From the first task's end until the last one's, as peers are measured."""

    @property
    def rate(self) -> float:
        """Tasks a second, waiting for the first notice included."""
        return self.tasks / self.seconds

    @property
    def working_rate(self) -> float:
        """Tasks a second once it works."""
        return (self.tasks - 1) / self.working_s


@dataclass(frozen=True)
class Site:
    """A running system, and what measurements do with it."""

    system: System

    @property
    def env(self) -> dict[str, str]:
        """The addresses of the stores."""
        return dict(read_env_file(self.system.home / "env"))

    def database(self, *, superuser: bool = False) -> psycopg.Connection[Any]:
        """Connect to PostgreSQL, committing each statement."""
        url = self.env["SUTAZAI_DATABASE_URL"]
        return psycopg.connect(
            superuser_url(self.system.home, url) if superuser else url, autocommit=True
        )

    def broker(self) -> redis.Redis:
        """Return a client of the broker."""
        return redis.Redis.from_url(self.env["SUTAZAI_BROKER_URL"])

    def is_whole(self) -> bool:
        """Whether the agent is healthy."""
        try:
            answer = self.system.client.get(f"{self.url}/health")
        except httpx.HTTPError:
            return False
        return answer.status_code == 200 and bool(answer.json()["status"] == "healthy")

    @property
    def url(self) -> str:
        """The address of the agent's front."""
        return f"http://127.0.0.1:{PORT + self.system.offset}"

    def url_of(self, name: str) -> str:
        """Return the address of a declared agent's front, or of `flower`."""
        return f"http://127.0.0.1:{(AGENTS | STORES)[name] + self.system.offset}"

    def accept_request(self, **params: Any) -> Request:
        """Return a request to accept one task."""
        body = {"action": AGENT, **params}
        return request("POST", f"{self.url}/process", body, Prefer="respond-async")

    def trip_request(self, wait_s: int = 60) -> Request:
        """Return a request that waits for its task's result."""
        return request(
            "POST", f"{self.url}/process", {"action": AGENT, "number": 1}, Prefer=f"wait={wait_s}"
        )

    def batch_request(self) -> Request:
        """Return a request to accept a thousand tasks."""
        return request("POST", f"{self.url}/tasks/batch", [{"action": AGENT}] * BATCH)

    def post(self, path: str) -> None:
        """Operate the front, as `POST /queue/pause` does."""
        self.system.client.post(f"{self.url}{path}").raise_for_status()

    @contextmanager
    def without_worker(self) -> Iterator[None]:
        """Keep the agent's worker from running meanwhile."""
        supervisor = Supervisor(self.system.home)
        supervisor.stop(WORKER)
        try:
            yield
        finally:
            supervisor.start(WORKER)
            pause_until(self.is_whole, 60, "the agent is healthy again")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the agent's queue from being worked on meanwhile."""
        self.post("/queue/pause")
        try:
            yield
        finally:
            self.post("/queue/resume")

    def drain(self, count: int) -> Drain:
        """Gather a backlog, let it go, and wait until all of it has finished."""
        with self.database() as connection:
            with self.paused():
                began = _one(connection, "SELECT clock_timestamp()")
                for _ in range(max(1, count // BATCH)):
                    size = min(count, BATCH)
                    body = [{"action": AGENT}] * size
                    batch = request("POST", f"{self.url}/tasks/batch", body)
                    fire(batch, 1, total=1).require("202")
                resumed_at = _one(connection, "SELECT clock_timestamp()")
            return self._await_drain(connection, began, resumed_at, count)

    def _await_drain(
        self, connection: psycopg.Connection[Any], since: datetime, resumed_at: datetime, count: int
    ) -> Drain:
        def is_drained() -> bool:
            return not _one(connection, _ANY_QUEUED, AGENT)

        pause_until(is_drained, 600, "the backlog is drained")
        found = connection.execute(_DRAINED, (AGENT, since)).fetchone()
        assert found is not None
        done, first_at, last_at = found
        if done != count:
            raise RuntimeError(f"{done} of {count} tasks have finished")
        return Drain(
            count,
            (last_at - resumed_at).total_seconds(),
            (last_at - first_at).total_seconds(),
        )

    def clear(self) -> None:
        """Forget all tasks, so that the next round finds what this one has found."""
        with self.database() as connection:
            connection.execute("TRUNCATE tasks, attempts, task_events")
        self.broker().flushall()

    def front(self) -> psutil.Process:
        """Return the process of the fronts."""
        return self.system.program("front")


_ANY_QUEUED = """
    SELECT EXISTS (SELECT 1 FROM tasks WHERE agent = %s AND state = 'queued')
        OR EXISTS (SELECT 1 FROM tasks WHERE state = 'running')
"""

_DRAINED = """
    SELECT count(*), min(finished_at), max(finished_at) FROM tasks
    WHERE agent = %s AND created_at >= %s AND state = 'succeeded'
"""


def _one(connection: psycopg.Connection[Any], query: str, *values: Any) -> Any:
    found = connection.execute(query.encode(), values).fetchone()
    assert found is not None
    return found[0]


def pause_until(condition: Any, within_s: float, what: str, *, every_s: float = 0.25) -> None:
    """Wait for a condition, asking seldom, so that asking costs what is measured nothing."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s:g} s: {what}")
        time.sleep(every_s)


def start_system(home: Path, *arguments: str) -> System:
    """Start `sutazai up`, and return when it printed its table of URLs."""
    return start(
        home, free_offset(6000), *arguments, PYTHONPATH=str(Path(__file__).parent / "agents")
    )


@contextmanager
def running(home: Path, *arguments: str) -> Iterator[Site]:
    """Run the system with the agent that does nothing, until the block ends."""
    site = Site(start_system(home, "--agent", f"{AGENT}:agent", *arguments))
    try:
        yield site
    finally:
        stop(site.system)


@contextmanager
def running_alone(folder: Path) -> Iterator[Site]:
    """Run the system with no other agent, and without Flower."""
    home = folder / f"place-{time.monotonic_ns()}" / ".sutazai"
    home.parent.mkdir()
    with running(home, "--agents", AGENT, "--no-flower") as site:
        yield site
