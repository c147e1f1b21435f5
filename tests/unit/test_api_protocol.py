"""What a front does with the bytes of a connection."""

from __future__ import annotations

import asyncio

from sutazai.api.protocol import _Gathering


class Sent:
    """A transport that remembers what it is told."""

    def __init__(self) -> None:
        self.calls: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        self.calls.append(data)

    def close(self) -> None:
        self.calls.append("close")

    def is_closing(self) -> bool:
        return "close" in self.calls


def test_what_is_written_in_one_go_is_sent_with_one_call() -> None:
    async def answer_twice() -> list[bytes | str]:
        sent = Sent()
        transport = _Gathering(sent, asyncio.get_running_loop())
        for data in (b"head ", b"body"):
            transport.write(data)
        assert sent.calls == []
        await asyncio.sleep(0)
        transport.write(b"later")
        await asyncio.sleep(0)
        return sent.calls

    assert asyncio.run(answer_twice()) == [b"head body", b"later"]


def test_what_is_written_is_sent_before_the_end() -> None:
    async def answer_and_close() -> list[bytes | str]:
        sent = Sent()
        transport = _Gathering(sent, asyncio.get_running_loop())
        transport.write(b"head ")
        transport.write(b"body")
        transport.close()
        assert transport.is_closing()
        await asyncio.sleep(0)
        return sent.calls

    assert asyncio.run(answer_and_close()) == [b"head body", "close"]
