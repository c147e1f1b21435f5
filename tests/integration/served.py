"""Two fronts on real ports, and a thread that performs what they ring."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx
import pytest
import uvloop
from pydantic import BaseModel

from sutazai import db, worker
from sutazai.agent import Agent, Context, NoParams
from sutazai.api.app import create_app
from sutazai.api.server import FrontServer, configure
from sutazai.api.waiting import Waiting
from sutazai.bell import Notice
from sutazai.errors import (
    LeaseLost,
    TaskCancelled,
    TaskFailed,
    TimeLimitExceeded,
)
from sutazai.keeper import Identity
from sutazai.reports import Reports

agent = Agent("test-front", port=8199, doc="Is tested.")
sampler = Agent("hardware-resource-optimizer", port=8002, doc="x", default_action="get_metrics")


class AddParams(BaseModel):
    first: int
    second: int = 0


class Sum(BaseModel):
    total: int


class FailParams(BaseModel):
    how: str


@agent.action(max_attempts=2)
def add(params: AddParams, context: Context) -> Sum:
    """Add two numbers."""
    return Sum(total=params.first + params.second)


FAILURES: dict[str, Exception] = {
    "plain": ValueError("no luck"),
    "late": TimeLimitExceeded("too slow"),
    "cancelled": TaskCancelled("not wanted"),
}


@agent.action()
def fail(params: FailParams, context: Context) -> Sum:
    """Fail."""
    raise FAILURES[params.how]


@agent.action()
def nothing(params: NoParams, context: Context) -> Sum:
    """Do nothing."""
    return Sum(total=0)


class TalkParams(BaseModel):
    lines: int = 2


@agent.action()
def talk(params: TalkParams, context: Context) -> Sum:
    """Tell what it does."""
    context.log.info("begun", lines=params.lines)
    context.progress(0.5, "half way")
    for number in range(params.lines):
        context.log.warning("line", number=number)
    context.progress(1.0, "done")
    return Sum(total=params.lines)


@sampler.action()
def get_metrics(params: NoParams, context: Context) -> Sum:
    """Sample."""
    return Sum(total=1)


class InlineWorker:
    """Implements `Bell`: a thread performs what is rung, through the real claim and finish."""

    def __init__(self) -> None:
        self.rung: queue.SimpleQueue[Notice | threading.Event | None] = queue.SimpleQueue()
        self.paused = False
        self._site: worker.Site | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def room(self, agent: str, priority: int) -> bool:
        return not self.paused

    def depth(self, agent: str) -> int | None:
        return 0

    def levels(self, agent: str) -> dict[int, int]:
        return {}

    def ring(self, notices: Any, pace: Any = None) -> None:
        for notice in notices:
            self.rung.put(notice)

    def perform(self, agent_name: str, action: str, task_id: UUID) -> None:
        with suppress(worker.NotClaimed, worker.Requeued, TaskFailed, LeaseLost):
            worker.perform(self.site(agent_name), agents[agent_name].get(action), task_id)

    def site(self, agent_name: str) -> worker.Site:
        identity = Identity(f"{agent_name}@here", agent_name, "here")
        system: Any = None
        return worker.Site(identity, Reports(), agents, system, self)

    def settle(self) -> None:
        """Wait until all that was rung is performed: an attempt locks rows of several tables."""
        idle = threading.Event()
        self.rung.put(idle)
        assert idle.wait(30)

    def stop(self) -> None:
        self.rung.put(None)
        self._thread.join(10)

    def _run(self) -> None:
        while (notice := self.rung.get()) is not None:
            if isinstance(notice, threading.Event):
                notice.set()
            else:
                self.perform(notice.agent, notice.action, notice.task_id)


agents: Mapping[str, Agent] = {agent.name: agent, sampler.name: sampler}


@dataclass
class Front:
    url: str
    sampler_url: str
    port: int
    bell: InlineWorker
    waiting: Waiting
    loop: asyncio.AbstractEventLoop
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=20)

    def queue(self, action: str = "add", **more: Any) -> str:
        """Hand over a task that nobody performs."""
        self.bell.paused = True
        params = {} if action in ("describe", "nothing") else {"first": 1}
        body = {"action": action, "params": params, **more}
        answer = self.client.post("/tasks", json=body)
        assert answer.status_code == 202, answer.text
        self.bell.paused = False
        return str(answer.json()["task_id"])


@pytest.fixture(scope="module")
def running(migrated: Any) -> Iterator[Front]:
    started: queue.SimpleQueue[Any] = queue.SimpleQueue()
    bell = InlineWorker()

    async def run() -> None:
        waiting = Waiting()
        servers, listeners = [], []
        for served in agents.values():
            app = create_app(served, agents=agents, bell=bell, waiting=waiting)
            servers.append(FrontServer(configure(app)))
            listeners.append(socket.create_server(("127.0.0.1", 0)))
        ports = [listener.getsockname()[1] for listener in listeners]
        runs = [
            asyncio.create_task(server.serve(sockets=[listener]))
            for server, listener in zip(servers, listeners, strict=True)
        ]
        started.put((ports, waiting, servers, asyncio.get_running_loop()))
        await asyncio.gather(*runs)
        await waiting.close()
        await db.async_dispose()

    def start() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())

    thread = threading.Thread(target=start)
    thread.start()
    (port, sampler_port), waiting, servers, loop = started.get(timeout=10)
    url = f"http://127.0.0.1:{port}"
    yield Front(url, f"http://127.0.0.1:{sampler_port}", port, bell, waiting, loop)
    for server in servers:
        loop.call_soon_threadsafe(server.stop)
    thread.join(20)
    bell.stop()
    assert not thread.is_alive()


@pytest.fixture
def front(running: Front, database: Any) -> Iterator[Front]:
    running.bell.paused = False
    yield running
    running.bell.settle()


def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(0.01)
    return found
