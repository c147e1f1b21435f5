"""What a front does with the bytes of a connection."""

from __future__ import annotations

import asyncio

from sutazai.api.protocol import _Event, _Gathering


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


def test_an_event_wakes_all_who_wait_and_whoever_comes_later() -> None:
    async def wait() -> None:
        event = _Event()
        waiters = [asyncio.create_task(event.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        waiters[0].cancel()
        event.set()
        done = await asyncio.gather(*waiters, return_exceptions=True)
        assert [type(each) for each in done] == [asyncio.CancelledError, type(None), type(None)]
        await event.wait()
        event.clear()
        late = asyncio.create_task(event.wait())
        await asyncio.sleep(0)
        assert not late.done()
        event.set()
        await late

    asyncio.run(asyncio.wait_for(wait(), 30))
