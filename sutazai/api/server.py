"""The server: the fronts of several agents in one process, on one event loop.

They share one database pool and one `Waiting`. Signals belong to the process, so uvicorn's own
handlers, one set a server, are not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn
import uvloop
from fastapi import FastAPI

from sutazai import db, log
from sutazai.agent import Agent
from sutazai.api.app import create_app
from sutazai.api.protocol import Protocol
from sutazai.api.waiting import Waiting
from sutazai.bell import Bell
from sutazai.errors import ConfigurationError
from sutazai.settings import settings
from sutazai.tasks import load

KEEP_ALIVE_S = 75
"""Longer than the 60 s of common load balancers, so that they, not we, close idle connections."""

STOP_WITHIN_S = 5

BACKLOG = 2048

_logger = log.get(__name__)


def serve(agents: Sequence[Agent], bell: Bell | None) -> int:
    """Serve the fronts of these agents until SIGTERM or SIGINT; return the exit code."""
    try:
        sockets = _listen(agents)
    except ConfigurationError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the one line an operator needs
        return 1
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(agents, bell, sockets))
    return 0


def _listen(agents: Sequence[Agent]) -> list[socket.socket]:
    """Take every port before anything is served; raises `ConfigurationError` that names one."""
    taken: list[socket.socket] = []
    for agent in agents:
        host, port = settings().bind, settings().port(agent.name, agent.port)
        try:
            taken.append(_bind(host, port))
        except OSError as error:
            for listener in taken:
                listener.close()
            raise ConfigurationError(
                f"The front of {agent.name} cannot listen on {host}:{port}: {error.strerror}."
            ) from None
    return taken


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # Bound alone is not taken: with SO_REUSEADDR a second process could bind it too.
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class FrontServer(uvicorn.Server):
    """A uvicorn server without signal handlers, which sleeps while nothing happens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the process."""
        yield

    async def main_loop(self) -> None:
        """Wait for the end; once a second the `Date` header is brought up to date."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._stopping.wait()

    def stop(self) -> None:
        """Stop accepting, let requests end."""
        self.should_exit = True
        self._stopping.set()


async def _serve(agents: Sequence[Agent], bell: Bell | None, sockets: list[socket.socket]) -> None:
    waiting = Waiting()
    declared = load().agents
    servers = [
        FrontServer(configure(create_app(agent, agents=declared, bell=bell, waiting=waiting)))
        for agent in agents
    ]

    def stop() -> None:
        waiting.release()
        for server in servers:
            server.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    for agent, listener in zip(agents, sockets, strict=True):
        _logger.info("front listens", agent=agent.name, port=listener.getsockname()[1])
    try:
        await asyncio.gather(
            *(
                server.serve(sockets=[listener])
                for server, listener in zip(servers, sockets, strict=True)
            )
        )
    finally:
        await waiting.close()
        await db.async_dispose()


def configure(app: FastAPI) -> uvicorn.Config:
    """Return uvicorn's configuration for a front."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=STOP_WITHIN_S,
    )
