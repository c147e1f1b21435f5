"""Fixtures of more than one file."""

from collections.abc import Callable, Iterator

import pytest

from sutazai import redis
from tests.conftest import Servers
from tests.integration.served import front, running

__all__ = ["front", "relays_are_told", "running"]


@pytest.fixture
def relays_are_told(database: Servers) -> Iterator[Callable[[], bool]]:
    """Give a question: have the relays been told, since it was asked last, that tasks are due?"""
    client = redis.client()
    assert client is not None
    with client.pubsub() as signals:
        signals.subscribe(redis.DUE_CHANNEL)
        assert signals.get_message(timeout=5), "it listens"
        # Whoever has published has done so before the next command of this process is answered.
        yield lambda: bool(client.ping() and signals.get_message(timeout=0.2))
