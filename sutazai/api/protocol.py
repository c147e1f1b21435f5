"""HTTP/1.1 with bounds that uvicorn does not set: on the size of headers, and on all arrivals.

Without them a client that sends one byte a minute keeps its connection for ever, and one that never
ends its header fills the memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sutazai.api.answer import error_answer
from sutazai.models import new_id

MAX_HEADER_BYTES = 64 * 1024

ARRIVE_WITHIN_S = 10.0
"""How long the header of a request may take to arrive, and its body."""

LATE = "sutazai.late"
"""An extension in the scope of a request whose body has not arrived in time."""


class Protocol(HttpToolsProtocol):
    """One connection."""

    _timer: asyncio.TimerHandle | None = None
    _in_header = True
    _header_bytes = 0
    _requests = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(_Gathering(transport, self.loop))  # type: ignore[arg-type]
        # uvicorn's own hold a queue each, which is mostly room for what never comes.
        self.pipeline = ()  # type: ignore[assignment]
        self.flow._is_writable_event = _Event(is_set=True)  # type: ignore[assignment]
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and bound what is still to come."""
        requests = self._requests
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_header and self._requests == requests:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(431, "header_too_large", "The header is larger than 64 KiB.")
                return
        # A request that has come whole needs no timer, and most do.
        is_idle = self.cycle is None or self.cycle.response_complete
        if self._timer is None and (is_idle or not self._in_header):
            self._arm()

    def on_headers_complete(self) -> None:
        """Begin to answer."""
        self._in_header = False
        self._header_bytes = 0
        self._disarm()
        if not self.pipeline and self.cycle is not None and not self.cycle.response_complete:
            self.pipeline = deque()  # this request has come before its turn
        super().on_headers_complete()
        self.cycle.message_event = _Event()  # type: ignore[assignment]

    def on_message_complete(self) -> None:
        """Expect the next header."""
        self._in_header = True
        self._requests += 1
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Count the time of a request that has come meanwhile from now on."""
        super().on_response_complete()
        if self._timer is not None:
            self._disarm()
            self._arm()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the shape of every other error."""
        self._refuse(400, "malformed_request", msg)

    def _arm(self) -> None:
        self._timer = self.loop.call_later(ARRIVE_WITHIN_S, self._time_out)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        elif self.pipeline or self._in_header or self.cycle.response_started:
            self._arm()
        else:
            # Whoever waits for the body goes on with what has come, and refuses it.
            self.cycle.scope["extensions"] = {LATE: {}}
            self.cycle.more_body = False
            self.cycle.message_event.set()

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"Connection": "close", "X-Request-ID": new_id().hex}
        answer: Any = error_answer(status, code, message, headers=headers)
        lines = [b"HTTP/1.1 %d Refused\r\n" % status]
        lines += [name + b": " + value + b"\r\n" for name, value in answer.raw_headers]
        self.transport.write(b"".join([*lines, b"\r\n", answer.body]))
        self.transport.close()


class _Event:
    """What uvicorn uses of asyncio's, without the queue that each of those makes for waiters."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self, *, is_set: bool = False) -> None:
        self._is_set = is_set
        self._waiters: tuple[asyncio.Future[None], ...] = ()

    def set(self) -> None:
        self._is_set = True
        woken, self._waiters = self._waiters, ()
        for waiter in woken:
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        self._is_set = False

    async def wait(self) -> None:
        if not self._is_set:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters = (*self._waiters, waiter)
            await waiter


class _Gathering:
    """A transport that sends the head and the body of an answer with one system call, not two."""

    __slots__ = ("_held", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send soon: together with what else is written before the event loop turns."""
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)

    def close(self) -> None:
        """Close when all is sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        held, self._held = self._held, []
        if held and not self._transport.is_closing():
            self._transport.write(held[0] if len(held) == 1 else b"".join(held))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
