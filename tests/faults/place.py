"""The system that faults are injected into: real processes on stores of their own."""

from __future__ import annotations

import contextlib
import enum
import json
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import redis

from sutazai import embedded
from sutazai.settings import read_env_file
from tests.acceptance.conftest import EXTRA, System, free_offset, start, stop
from tests.conftest import free_port, started
from tests.faults import disk
from tests.faults.network import Proxy

AGENT = "target"
WORKER = f"worker-{AGENT}"
PORT = 8191
TICK_S = 1.0
"""The period of the schedule that the agent declares."""

FIRST_OFFSETS = range(4000, 24_000, 500)
"""Where to look for free ports: by chance, so that suites do not get in each other's way."""

HOME_SIZE = "600m"
LOGS_SIZE = "16m"


class Kind(enum.Enum):
    """What a place is like beyond being a running system."""

    PLAIN = "as `sutazai up` starts it"
    PROXIED = "with a proxy in front of each store"
    CRAMPED = "with home and logs on small disks"


@dataclass
class Place:
    """A running system of one agent, and ways to reach its parts."""

    system: System
    kind: Kind
    stores: Path
    """The home of PostgreSQL and the broker; the system's own, unless they are behind proxies."""

    links: dict[str, Proxy] = field(default_factory=dict)
    """The proxies, by what they stand before: postgresql and valkey."""

    notes: dict[str, float] = field(default_factory=dict)
    """What a fault has measured itself, in seconds."""

    _stack: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def open(
        cls, folder: Path, kind: Kind = Kind.PLAIN, *, flower: bool = False, **given: str
    ) -> Place:
        """Start the system and make the table that effects are counted in.

        given: more variables of its environment.
        """
        home = stores = folder / ".sutazai"
        env = {"PYTHONPATH": str(Path(__file__).parent / "agents"), **given}
        links: dict[str, Proxy] = {}
        with ExitStack() as stack:
            if kind is Kind.CRAMPED:
                _mount(stack, home, HOME_SIZE)
                _mount(stack, home / "log", LOGS_SIZE)
            if kind is Kind.PROXIED:
                stores = folder / "stores"
                links, urls = _proxied_stores(stack, stores)
                env |= urls
            running = _start(home, _reserve_ports(stack), env, flower=flower)
            place = cls(running, kind, stores, links)
            stack.callback(lambda: _insist(place.system.process))
            with place.database() as connection:
                connection.execute("CREATE TABLE effects (task_id uuid)")
                connection.execute("CREATE INDEX ON effects (task_id)")
            place._stack = stack.pop_all()
        return place

    def close(self) -> int:
        """Stop the system and clear up after it; return its exit code."""
        with self._stack:
            return stop(self.system)

    def note(self, what: str, seconds: float) -> None:
        """Keep the longest time that a fault has measured of something."""
        self.notes[what] = max(seconds, self.notes.get(what, 0.0))

    def restart(self) -> None:
        """Stop the whole system as an operator does, and start it again."""
        env = {name: value for name, value in self.system.env.items() if name in _KEPT}
        code = stop(self.system)
        assert code == 0, f"the system ended with {code}"
        self.system = _start(self.system.home, self.system.offset, env)

    @property
    def url(self) -> str:
        """The address of the agent's front."""
        return f"http://127.0.0.1:{PORT + self.system.offset}"

    @property
    def env(self) -> dict[str, str]:
        """The addresses of the stores, past all proxies."""
        return dict(read_env_file(self.stores / "env"))

    def connect(self, *, superuser: bool = False) -> psycopg.Connection[Any]:
        """Connect to PostgreSQL, committing each statement."""
        url = self.env["SUTAZAI_DATABASE_URL"]
        if superuser:
            known = json.loads((self.stores / "credentials.json").read_text())
            address = url.split("@", 1)[1]
            url = f"postgresql://postgres:{known['superuser']}@{address}"
        return psycopg.connect(url, autocommit=True, connect_timeout=2)

    def database(self, *, superuser: bool = False) -> psycopg.Connection[Any]:
        """Connect to PostgreSQL; tried until it answers."""

        def connect() -> Any:
            try:
                return self.connect(superuser=superuser)
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

    def children(self) -> list[psutil.Process]:
        """Return the processes of the worker's pool."""

        def find() -> list[psutil.Process]:
            try:
                return list(self.process(WORKER).children())
            except psutil.NoSuchProcess:
                return []

        found: list[psutil.Process] = until(find, 30, "the worker has a pool")
        return found

    def await_state(self, task_id: str, state: str, within_s: float) -> None:
        """Wait until a task is in a state; raises `TimeoutError`."""
        query = "SELECT state FROM tasks WHERE task_id = %s"
        until(lambda: self.value(query, task_id) == state, within_s, f"{task_id} is {state}")

    def is_whole(self) -> bool:
        """Whether the agent is healthy."""
        try:
            answer = httpx.get(f"{self.url}/health", timeout=5)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200 and answer.json()["status"] == "healthy"


_KEPT = ("PYTHONPATH", "SUTAZAI_DATABASE_URL", "SUTAZAI_BROKER_URL")


def _start(home: Path, offset: int, env: dict[str, str], *, flower: bool = False) -> System:
    chosen = ["--agent", f"{AGENT}:agent", "--agents", AGENT]
    running = start(home, offset, *chosen, *([] if flower else ["--no-flower"]), **env)
    running.env["SUTAZAI_AGENTS"] = f"{AGENT}:agent"
    return running


def _insist(process: subprocess.Popen[str]) -> None:
    """End a system that has not ended: at once, as a second Ctrl-C does, or else by force."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()  # the kernel then ends the supervisor, and it everything else
        process.wait(30)


def _reserve_ports(stack: ExitStack) -> int:
    """Return a free offset, and keep others from it also while the system is being restarted."""
    while True:
        offset = free_offset(random.choice(FIRST_OFFSETS))
        with contextlib.suppress(OSError):  # somebody was quicker
            # The port of an agent that is not run here: who looks for an offset looks at it too.
            guard = socket.create_server(("127.0.0.1", EXTRA["probe"] + offset))
            stack.callback(guard.close)
            return offset


def _mount(stack: ExitStack, folder: Path, size: str) -> None:
    folder.mkdir(parents=True)
    disk.mount(folder, size)
    stack.callback(disk.unmount, folder)


def _proxied_stores(stack: ExitStack, home: Path) -> tuple[dict[str, Proxy], dict[str, str]]:
    """Start the stores by themselves, and a proxy for each; return the addresses of the proxies."""
    ports = {"postgresql": free_port(), "valkey": free_port()}
    direct = embedded.prepare(home, *ports.values())
    for program in embedded.server_programs(home):
        stack.enter_context(started(home, program))
    embedded.wait_for_servers(direct)
    links = {name: Proxy(port) for name, port in ports.items()}
    for link in links.values():
        stack.callback(link.close)
    urls = {
        variable: direct[variable].replace(f":{ports[name]}/", f":{links[name].port}/")
        for variable, name in (
            ("SUTAZAI_DATABASE_URL", "postgresql"),
            ("SUTAZAI_BROKER_URL", "valkey"),
        )
    }
    return links, urls


class Places:
    """The place that faults need, one at a time; opened when first asked for."""

    def __init__(self) -> None:
        self._place: Place | None = None
        self._folder: Path | None = None

    def of(self, kind: Kind) -> Place:
        """Return a place of a kind, healthy or not."""
        if self._place is None or self._place.kind is not kind:
            code = self.close()
            assert code == 0, f"the system ended with {code}"
            self._folder = Path(tempfile.mkdtemp(prefix="sutazai-fault-", dir="/tmp"))
            self._place = Place.open(self._folder, kind)
        return self._place

    def close(self) -> int:
        """Close what is open; return the exit code of its system."""
        place, folder = self._place, self._folder
        self._place = self._folder = None
        try:
            return place.close() if place else 0
        finally:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)

    def discard(self) -> None:
        """Close what is open, in whatever state it is."""
        with contextlib.suppress(Exception):
            self.close()


@contextmanager
def frozen(*processes: psutil.Process) -> Iterator[Sequence[psutil.Process]]:
    """Suspend processes while entered."""
    try:
        for process in processes:
            process.suspend()
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def kill(process: psutil.Process) -> None:
    """Kill a process, unless it was quicker."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def last(seconds: float) -> None:
    """Let a fault last for so long."""
    time.sleep(seconds)


def until(
    condition: Callable[[], Any], within_s: float, what: str, look_each_s: float = 0.05
) -> Any:
    """Return the first value of a condition that is true; raises `TimeoutError`."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s:g} s: {what}")
        time.sleep(look_each_s)
    return value
