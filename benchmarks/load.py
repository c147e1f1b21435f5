"""A load generator that costs little: preformed requests on raw sockets that stay open.

One event loop keeps N connections busy; each sends its next request when it has the answer to the
one before. What it could do at most is measured against a server that always says the same
(`python -m benchmarks.load PORT`).
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_END = b"\r\n\r\n"
_WAVE = 100
"""Connections are made so many at a time: no more than a listener's backlog takes."""


@dataclass(frozen=True)
class Request:
    """A request, formed once and sent as often as wanted."""

    host: str
    port: int
    raw: bytes


def request(method: str, url: str, body: Any = None, **headers: str) -> Request:
    """Form a request; underscores in the names of headers mean hyphens."""
    parts = urlsplit(url)
    content = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{method} {parts.path or '/'}{'?' + parts.query if parts.query else ''} HTTP/1.1",
        f"Host: {parts.netloc}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    if content:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    raw = "\r\n".join([*lines, "", ""]).encode() + content
    return Request(parts.hostname or "127.0.0.1", parts.port or 80, raw)


@dataclass
class Answers:
    """What came back."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    """Connections that ended before they had their answer."""

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """Return the latency that so many percent of the answers did not exceed."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    def require(self, status: str) -> Answers:
        """Return itself; raises `RuntimeError` when an answer had another status."""
        if set(self.statuses) != {status} or self.lost:
            raise RuntimeError(f"expected {status}, got {dict(self.statuses)}, lost {self.lost}")
        return self


def fire(
    wanted: Request,
    connections: int,
    *,
    total: int | None = None,
    seconds: float = 3600.0,
    arrivals_per_s: float | None = None,
) -> Answers:
    """Send a request again and again until `total` answers have come, or for so many seconds.

    With `arrivals_per_s`, connections come one after the other and send at once; without, all of
    them begin together.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        loop = runner.get_loop()
        volley = _Volley(wanted.raw, total, loop.create_future(), open=connections)
        return runner.run(_fire(wanted, volley, connections, seconds, arrivals_per_s))


async def _fire(
    wanted: Request,
    volley: _Volley,
    connections: int,
    seconds: float,
    arrivals_per_s: float | None,
) -> Answers:
    loop = asyncio.get_running_loop()
    clients = [_Client(volley) for _ in range(connections)]
    began = time.perf_counter()
    for start in range(0, connections, _WAVE):
        wave = clients[start : start + _WAVE]
        connecting = (
            loop.create_connection(partial(_itself, client), wanted.host, wanted.port)
            for client in wave
        )
        await asyncio.gather(*connecting)
        if arrivals_per_s is not None:
            _send(volley, wave, began + seconds)
            await asyncio.sleep(began + (start + _WAVE) / arrivals_per_s - time.perf_counter())
    if arrivals_per_s is None:
        began = time.perf_counter()
        _send(volley, clients, began + seconds)
    await volley.done
    volley.answers.seconds = time.perf_counter() - began
    for client in clients:
        client.close()
    return volley.answers


def _send(volley: _Volley, clients: Sequence[_Client], until: float) -> None:
    volley.until = until
    for client in clients:
        client.send()


def _itself(client: _Client) -> _Client:
    return client


@dataclass
class _Volley:
    """What all connections share."""

    raw: bytes
    left: int | None
    done: asyncio.Future[None]
    until: float = 0.0
    open: int = 0
    answers: Answers = field(default_factory=Answers)

    def may_send(self) -> bool:
        if time.perf_counter() >= self.until:
            return False
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0

    def lose_one(self) -> None:
        self.answers.lost += 1
        self.finish_one()

    def finish_one(self) -> None:
        self.open -= 1
        if self.open == 0 and not self.done.done():
            self.done.set_result(None)


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, volley: _Volley) -> None:
        self._volley = volley
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._sent_at = 0.0
        self._is_waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def send(self) -> None:
        """Send the next request, if there is to be one."""
        if self._transport is None:
            self._volley.lose_one()
            return
        self._is_waiting = self._volley.may_send()
        if not self._is_waiting:
            self._volley.finish_one()
            return
        self._sent_at = time.perf_counter()
        self._transport.write(self._volley.raw)

    def data_received(self, data: bytes) -> None:
        received = self._received + data if self._received else data
        head = received.find(_END)
        length = _LENGTH.search(received, 0, head + 2) if head >= 0 else None
        if length is None or len(received) < head + len(_END) + int(length[1]):
            self._received = received
            return
        self._received = b""
        answers = self._volley.answers
        answers.latencies.append(time.perf_counter() - self._sent_at)
        answers.statuses[received[9:12].decode()] += 1
        self.send()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._is_waiting:
            self._is_waiting = False
            self._volley.lose_one()

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.close()


class _Constant(asyncio.Protocol):
    """A server that says the same to every request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 2\r\n\r\n{}")


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Constant, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as own:
        own.run(_serve(int(sys.argv[1])))
