"""What `sutazai up` does: starts everything in order, waits until it is healthy, and stays."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
from rich.status import Status

from sutazai.agent import Agent
from sutazai.cli import attend
from sutazai.cli.output import cell, console, errors, fail, table
from sutazai.embedded import (
    Program,
    Supervisor,
    port_holder,
    prepare,
    recover,
    server_programs,
    supervise,
    wait_for_servers,
)
from sutazai.errors import ConfigurationError, SutazaiError, Unavailable
from sutazai.settings import FLOWER_PORT, is_given, read_env_file, remember, remember_home, settings

HEALTHY_WITHIN_S = 60.0
SHARED_MODULES = (
    "billiard.popen_fork",
    "billiard.sharedctypes",
    "celery.app.routes",
    "celery.apps.beat",
    "celery.apps.worker",
    "celery.bin.celery",
    "celery.concurrency.asynpool",
    "celery.concurrency.prefork",
    "celery.loaders.app",
    "celery.worker.consumer",
    "certifi",
    "flower.command",
    "sutazai.api.server",
    "sutazai.celery",
    "sutazai.relay",
    "sutazai.scheduler",
    "uvicorn.protocols.http.httptools_impl",
)
"""What the processes would each import after the fork."""

POSTGRESQL_PORT = 10_000
VALKEY_PORT = 10_001


class Health(NamedTuple):
    """What a front said of its agent; `unreachable` when it did not answer."""

    status: str
    reasons: list[str]

    @property
    def is_up(self) -> bool:
        """Whether the agent takes work."""
        return self.status in ("healthy", "degraded")


class System:
    """One `up`: what it starts, in order, and how it tells of it."""

    def __init__(self, agents: Sequence[Agent], *, flower: bool, detach: bool) -> None:
        self._agents = agents
        self._flower = flower
        self._detach = detach
        self._home = settings().home
        self._offset = settings().port_offset
        self._embedded = not (is_given("database_url") and is_given("broker_url"))
        if self._embedded and (is_given("database_url") or _given_redis_broker()):
            raise ConfigurationError(
                "SUTAZAI_DATABASE_URL and SUTAZAI_BROKER_URL: set both, or neither for "
                "embedded servers; RabbitMQ alone may be set."
            )

    def start(self, progress: Status) -> int:
        """Start everything, wait until it is healthy, and stay until stopped; the exit code."""
        supervisor = Supervisor(self._home)
        if supervisor.running():
            raise ConfigurationError(
                f"{self._home} is running already: `sutazai status`, `sutazai down`."
            )
        recover(self._home)
        self._refuse_taken_ports()
        began = time.monotonic()
        programs = self._programs()
        remember_home(self._home)
        _import_everything()
        progress.stop()  # its thread may hold locks, which a fork would inherit
        child = os.fork()
        if child == 0:
            os.setsid()
            if not self._detach:
                _stop_with_parent()
            _silence(self._home)
            os._exit(supervise(self._home, programs, _run_forked))
        stopping = attend.forward_signals(child)
        progress.start()
        try:
            progress.update("Starting the stores …")
            self._await_stores(child)
            progress.update("Bringing the schema up to date …")
            _migrate()
            progress.update("Starting the agents …")
            supervisor.start_all()
            code = self._await_health(progress, child, stopping)
        except SutazaiError as error:
            code = fail(str(error), 1)
        except BaseException:
            if not stopping:
                attend.stop(child)
            raise
        progress.stop()
        if code == 0 and not stopping:
            self._show(time.monotonic() - began)
            if self._detach:
                attend.forget_signals()
                return 0
            attend.stay(child)
        if not stopping:  # which has been handed on: a second one would stop at once
            attend.stop(child)
        ended = attend.await_end(child)
        return code or ended

    def _programs(self) -> list[Program]:
        programs: list[Program] = []
        if self._embedded:
            ports = POSTGRESQL_PORT + self._offset, VALKEY_PORT + self._offset
            broker_url = settings().broker_url if is_given("broker_url") else None
            prepare(self._home, *ports, broker_url=broker_url)
            programs += server_programs(self._home)
        else:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        # So that other commands ask the right ports, and know the same agents.
        remember(self._home, port_offset=self._offset, agents=settings().agents)
        settings.cache_clear()
        names = [agent.name for agent in self._agents]
        ours: dict[str, tuple[str, ...]] = {f"worker-{name}": ("worker", name) for name in names}
        ours |= {"front": ("api", ",".join(names)), "relay": ("relay",), "beat": ("beat",)}
        if self._flower:
            ours["flower"] = ("flower",)
        programs += [Program(name=name, args=args, autostart=False) for name, args in ours.items()]
        return programs

    def _refuse_taken_ports(self) -> None:
        """Name every port that is taken, before anything is started."""
        bind = settings().bind
        wanted = {
            f"the front of {agent.name}": (settings().port(agent.name, agent.port), bind)
            for agent in self._agents
        }
        if self._flower:
            wanted["Flower"] = (FLOWER_PORT + self._offset, bind)
        if self._embedded:
            wanted["PostgreSQL"] = (POSTGRESQL_PORT + self._offset, "127.0.0.1")
            wanted["Valkey"] = (VALKEY_PORT + self._offset, "127.0.0.1")
        taken = [
            f"port {port} ({what}) is held by {holder}"
            for what, (port, host) in wanted.items()
            if (holder := port_holder(port, host))
        ]
        if taken:
            raise ConfigurationError(
                "; ".join(taken) + ". Stop the holder, use `sutazai up --port-offset N`, or, for a "
                "store, use it by SUTAZAI_DATABASE_URL and SUTAZAI_BROKER_URL."
            )

    def _await_stores(self, child: int) -> None:
        _await_supervisor(self._home, child)
        if self._embedded:
            wait_for_servers(read_env_file(self._home / "env"))

    def _await_health(self, progress: Status, child: int, stopping: list[int]) -> int:
        """Wait until every agent is healthy or degraded; 1 when one is not in time."""
        until = time.monotonic() + HEALTHY_WITHIN_S
        self._health: dict[str, Health] = {}
        with httpx.Client(timeout=2.5) as client:
            while time.monotonic() < until and not stopping:
                self._health = {agent.name: _ask(client, agent) for agent in self._agents}
                missing = [name for name, health in self._health.items() if not health.is_up]
                if not missing:
                    return 0
                if os.waitpid(child, os.WNOHANG) != (0, 0):
                    raise Unavailable(f"The supervisor ended; see {self._home / 'log'}.")
                progress.update(f"Waiting for {', '.join(missing)} …")
                time.sleep(0.1)
        if stopping:
            return 1
        for name, health in self._health.items():
            if not health.is_up:
                why = "; ".join(health.reasons) or health.status
                log = self._home / "log" / f"worker-{name}.log"
                errors.print(f"[red]{name}[/red] is not healthy: {cell(why)} (log: {log})")
        return 1

    def _show(self, took_s: float) -> None:
        host = _address()
        rows = [
            (
                agent.name,
                self._health[agent.name].status,
                f"http://{host}:{settings().port(agent.name, agent.port)}",
                "; ".join(self._health[agent.name].reasons) or agent.summary,
            )
            for agent in self._agents
        ]
        if self._flower:
            url = f"http://{host}:{FLOWER_PORT + self._offset}"
            rows.append(("flower", "–", url, "The dashboard of workers and tasks."))
        console.print(table(("AGENT", "HEALTH", "URL", ""), rows))
        how = "`sutazai down` stops it" if self._detach else "Ctrl-C stops it"
        errors.print(f"\nStarted in {took_s:.1f} s; logs: {self._home / 'log'}; {how}.")


def _given_redis_broker() -> bool:
    """Whether a Redis was given as the broker; the embedded one would be a second."""
    return is_given("broker_url") and not (settings().broker_url or "").startswith("amqp")


def _ask(client: httpx.Client, agent: Agent) -> Health:
    port = settings().port(agent.name, agent.port)
    try:
        answer = client.get(f"http://{_address()}:{port}/health").json()
        return Health(answer["status"], answer.get("reasons", []))
    except (httpx.HTTPError, ValueError, KeyError):
        return Health("unreachable", ["its front does not answer"])


def _address() -> str:
    """Return where this machine reaches what listens on the configured address."""
    bind = settings().bind
    if bind in ("0.0.0.0", "::"):  # noqa: S104 - compared only
        return "127.0.0.1"
    return f"[{bind}]" if ":" in bind else bind


def _import_everything() -> None:
    """Load what the processes need before they are forked, so that they share its memory."""
    for name in SHARED_MODULES:
        with suppress(ModuleNotFoundError):  # of another version: then each process imports it
            importlib.import_module(name)


def _run_forked(arguments: list[str]) -> int:
    from sutazai.cli import run

    return run(arguments)


def _stop_with_parent() -> None:
    """Ask Linux to end the supervisor, and with it everything, should this command be killed."""
    from sutazai.keeper import die_with_parent

    die_with_parent(signal.SIGTERM)


def _silence(home: Path) -> None:
    """Send what the supervisor itself prints to its log, not into the table of URLs."""
    folder = home / "log"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = os.open(folder / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(target, 1)
    os.dup2(target, 2)


def _migrate() -> None:
    from sutazai.migration import migrate

    migrate()


def _await_supervisor(home: Path, child: int) -> None:
    until = time.monotonic() + 10
    while not Supervisor(home).running():
        if time.monotonic() > until or os.waitpid(child, os.WNOHANG) != (0, 0):
            raise Unavailable(f"The supervisor did not start; see {home / 'log'}.")
        time.sleep(0.05)
