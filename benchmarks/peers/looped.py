"""What peers with an asynchronous interface share."""

import asyncio
from abc import abstractmethod
from collections.abc import Coroutine
from typing import Any, TypeVar

from benchmarks.peers.peer import Peer

T = TypeVar("T")


class LoopedPeer(Peer):
    """A peer that is spoken to on an event loop of its own."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the loop."""
        return self._runner.run(work)

    @abstractmethod
    async def send(self, number: int) -> Any:
        """Hand over one task; return what its result is asked of."""

    @abstractmethod
    async def receive(self, sent: Any) -> None:
        """Wait for a result."""

    async def _send_many(self, count: int) -> None:
        for number in range(count):
            await self.send(number)

    async def _trip(self) -> None:
        await self.receive(await self.send(1))

    def submit(self, count: int) -> None:
        self.run(self._send_many(count))

    def trip(self) -> None:
        self.run(self._trip())
