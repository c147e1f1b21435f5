"""The one Redis client: samples, registry, signals. Its absence degrades, it never fails a task.

The broker is Celery's business; this is for what may be lost: the latest hardware sample, the
registry of live agents, and the signals that wake waiting clients, and the relay, sooner than
polling would.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from uuid import UUID

import redis as library
from redis.backoff import NoBackoff
from redis.retry import Retry

from sutazai import log, payload
from sutazai.settings import settings

if TYPE_CHECKING:
    from redis.asyncio import Redis as AsyncRedis

T = TypeVar("T")

PAUSE_AFTER_FAILURE_S = 2.0
"""After a failure Redis is left alone for this long, so that its absence costs no time-outs."""

DUE_CHANNEL = "sutazai:due"
"""Where relays are told that tasks have become due out of turn."""

LISTEN_S = 5.0
"""How late a listener notices that it was stopped."""

_OPTIONS: dict[str, Any] = {
    "decode_responses": True,
    "socket_timeout": 1.0,
    "socket_connect_timeout": 1.0,
    "socket_keepalive": True,
}

_logger = log.get(__name__)
_client: library.Redis | None = None
_silent_until = 0.0


def client() -> library.Redis | None:
    """Return this process's client, or None where no Redis is configured."""
    global _client  # noqa: PLW0603 - one connection pool a process
    url = settings().signals_url
    if _client is None and url:
        # A connection that broke is made anew; a silent one has cost its time-out once already.
        again = Retry(NoBackoff(), 1, supported_errors=(library.ConnectionError,))
        _client = library.Redis.from_url(url, retry=again, **_OPTIONS)
    return _client


def asynchronous() -> AsyncRedis | None:
    """Return a client for an event loop, or None without Redis; the caller closes it."""
    from redis.asyncio import Redis as AsyncRedis  # noqa: PLC0415 - only fronts need it

    url = settings().signals_url
    if not url:
        return None
    made: AsyncRedis = AsyncRedis.from_url(url, **{**_OPTIONS, "socket_timeout": None})
    return made


def attempt(call: Callable[[library.Redis], T]) -> T | None:
    """Run a call and return its result, or None when Redis is absent or does not answer."""
    global _silent_until  # noqa: PLW0603 - the breaker is one a process
    connection = client()
    if connection is None or time.monotonic() < _silent_until:
        return None
    try:
        return call(connection)
    except (library.RedisError, OSError) as error:
        _silent_until = time.monotonic() + PAUSE_AFTER_FAILURE_S
        _logger.warning("redis does not answer", error=str(error))
        return None


def events_channel(agent: str) -> str:
    """Return the channel on which an agent's task events are published."""
    return f"events:{agent}"


def announce(agent: str, task_id: UUID, **event: Any) -> None:
    """Publish an event of a task for those who wait or watch; losing it costs them a poll."""
    text = _event(task_id, event)
    attempt(lambda connection: connection.publish(events_channel(agent), text))


def _event(task_id: UUID, event: Mapping[str, Any]) -> str:
    return payload.dumps({"task_id": str(task_id), **event})


class Ended(Protocol):
    """A task that has ended."""

    @property
    def task_id(self) -> UUID:
        """Its id."""

    @property
    def agent(self) -> str:
        """Whose it is."""

    @property
    def state(self) -> str:
        """How it ended."""


def announce_ended(ended: Sequence[Ended]) -> None:
    """Publish that tasks have ended, in one round trip."""
    if ended:
        attempt(lambda connection: _publish_all(connection, ended))


_PUBLISH_ALL = "for i = 1, #ARGV, 2 do redis.call('PUBLISH', ARGV[i], ARGV[i + 1]) end"
"""One command: as many of them, with an answer each, cost what is published several times over."""


def _publish_all(connection: library.Redis, ended: Sequence[Ended]) -> None:
    arguments: list[str] = []
    for gone in ended:
        text = _event(gone.task_id, {"kind": "state", "state": gone.state})
        arguments += (events_channel(gone.agent), text)
    if len(ended) == 1:
        connection.publish(*arguments)
    else:
        connection.eval(_PUBLISH_ALL, 0, *arguments)


def announce_due() -> None:
    """Tell the relays that tasks have become due out of turn; losing it costs them a pass."""
    attempt(lambda connection: connection.publish(DUE_CHANNEL, ""))


def listen(channel: str, heard: Callable[[], None], stopping: threading.Event) -> None:
    """Call back when something is published, and when it may have been missed, until stopped."""
    while not stopping.is_set():
        connection = client()
        if connection is None:
            return
        try:
            with connection.pubsub() as signals:  # type: ignore[no-untyped-call]
                signals.subscribe(channel)
                while not stopping.is_set():
                    if signals.get_message(timeout=LISTEN_S) is not None:
                        heard()
        except (library.RedisError, OSError) as error:
            _logger.debug("no signals from redis", error=str(error))
        stopping.wait(PAUSE_AFTER_FAILURE_S)


def _forget() -> None:
    global _client  # noqa: PLW0603 - a connection may not be shared with a forked child
    _client = None


os.register_at_fork(after_in_child=_forget)
