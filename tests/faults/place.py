"""The system that faults are injected into: real processes on stores of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import redis

from sutazai.settings import read_env_file
from tests.acceptance.conftest import System, free_offset, start, stop

AGENT = "target"
PORT = 8191


@dataclass
class Place:
    """A running system of one agent, and ways to reach its parts."""

    system: System
    notes: dict[str, float] = field(default_factory=dict)
    """What a fault has measured itself, in seconds."""

    @classmethod
    def open(cls, home: Path) -> Place:
        """Start the system and make the table that effects are counted in."""
        agents = Path(__file__).parent / "agents"
        running = start(
            home,
            free_offset(4000),
            *("--agent", f"{AGENT}:agent", "--agents", AGENT, "--no-flower"),
            PYTHONPATH=str(agents),
        )
        running.env["SUTAZAI_AGENTS"] = f"{AGENT}:agent"
        place = cls(running)
        with place.database() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS effects (task_id uuid)")
        return place

    def close(self) -> int:
        """Stop the system; return its exit code."""
        return stop(self.system)

    @property
    def url(self) -> str:
        """The address of the agent's front."""
        return f"http://127.0.0.1:{PORT + self.system.offset}"

    @property
    def env(self) -> dict[str, str]:
        """The addresses of the stores."""
        return dict(read_env_file(self.system.home / "env"))

    def database(self, *, superuser: bool = False) -> psycopg.Connection[Any]:
        """Connect to PostgreSQL, committing each statement; tried until it answers."""
        url = self.env["SUTAZAI_DATABASE_URL"]
        if superuser:
            known = json.loads((self.system.home / "credentials.json").read_text())
            address = url.split("@", 1)[1]
            url = f"postgresql://postgres:{known['superuser']}@{address}"

        def connect() -> Any:
            try:
                return psycopg.connect(url, autocommit=True, connect_timeout=2)
            except psycopg.OperationalError:
                return None

        found: psycopg.Connection[Any] = until(connect, 60, "PostgreSQL answers")
        return found

    def broker(self) -> redis.Redis:
        """Return a client of the broker."""
        return redis.Redis.from_url(self.env["SUTAZAI_BROKER_URL"], socket_timeout=5)

    def process(self, name: str) -> psutil.Process:
        """Return the process that runs under a name."""

        def find() -> Any:
            try:
                found = self.system.program(name)
            except (ValueError, psutil.NoSuchProcess):
                return None
            return found if found.is_running() else None

        running: psutil.Process = until(find, 60, f"{name} runs")
        return running

    def post(self, action: str, key: str, **params: Any) -> httpx.Response:
        """Hand over a task, once."""
        headers = {"Prefer": "respond-async", "Idempotency-Key": key}
        body = {"action": action, **params}
        return httpx.post(f"{self.url}/process", json=body, headers=headers, timeout=10)

    def submit(self, action: str, key: str, **params: Any) -> str:
        """Hand over a task until it is accepted; return its id."""

        def accept() -> Any:
            try:
                answer = self.post(action, key, **params)
            except httpx.HTTPError:
                return None
            return answer.json()["task_id"] if answer.status_code == 202 else None

        return str(until(accept, 60, f"{action} is accepted"))

    def value(self, query: str, *values: Any) -> Any:
        """Return the first value of a query, asked until PostgreSQL answers."""

        def ask() -> Any:
            try:
                with self.database() as connection:
                    return connection.execute(query, values).fetchone() or (None,)
            except psycopg.OperationalError:
                return None

        return until(ask, 60, "PostgreSQL answers")[0]

    def state(self, task_id: str) -> str:
        """Return the state of a task."""
        return str(self.value("SELECT state FROM tasks WHERE task_id = %s", task_id))

    def is_whole(self) -> bool:
        """Whether the agent is healthy."""
        try:
            answer = httpx.get(f"{self.url}/health", timeout=5)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200 and answer.json()["status"] == "healthy"


def until(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """Return the first value of a condition that is true; raises `TimeoutError`."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s:g} s: {what}")
        time.sleep(0.05)
    return value
