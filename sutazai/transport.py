"""Redis as Celery's broker, read so that no message can end the worker that takes it.

Whatever lies on a queue comes from whoever may write there. kombu lets a message that it cannot
read raise through the consumer's loop, and Celery then ends its worker.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis
from kombu.utils import json

from sutazai import log

_logger = log.get(__name__)


class _CarefulChannel:
    """What both kinds of channel add to kombu's."""

    connection: Any
    pool: Any
    _lasting: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        """Return one client as long as its pool lives: kombu makes one for each publication.

        It holds no connection of its own, and to make one costs more than to publish.
        """
        kombu: Any = super()
        if asynchronous:
            return kombu._create_client(asynchronous)
        if self._lasting is None or self._lasting.connection_pool is not self.pool:
            self._lasting = kombu._create_client()
        return self._lasting

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Any, *args: Any, **more: Any
    ) -> None:
        """Consume from a queue; a message that cannot be handled is dropped."""

        def receive(message: Any) -> Any:
            try:
                return callback(message)
            except (*self.connection.connection_errors, *self.connection.channel_errors):
                raise
            except Exception:
                _logger.exception("dropped a message that cannot be handled", queue=queue)
                if not message.acknowledged:
                    message.reject()  # else it would take up a place among those in hand

        kombu: Any = super()
        kombu.basic_consume(queue, no_ack, receive, *args, **more)


class _CarefulTransport:
    """What both kinds of transport add to kombu's."""

    connection_errors: Any
    channel_errors: Any
    cycle: Any

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Read from an event loop, without the timer that wakes it for queues that expire.

        Only queues for commands do; on Redis nobody reads the table that would be kept for them.
        """
        kombu: Any = super()
        kombu.register_with_event_loop(connection, loop)
        timer = getattr(self.cycle, "_binding_expiry_tref", None)
        if timer is not None:
            timer.cancel()

    def _deliver(self, message: Any, queue: str) -> None:
        kombu: Any = super()
        try:
            kombu._deliver(message, queue)
        except (*self.connection_errors, *self.channel_errors):
            raise
        except Exception as error:
            _logger.warning("dropped what is no message", queue=queue, why=repr(error)[:200])


class _Channel(_CarefulChannel, redis.Channel):
    """A channel to Redis."""


class _SentinelChannel(_CarefulChannel, redis.SentinelChannel):
    """A channel to a Redis that Sentinels watch over."""


class Transport(_CarefulTransport, redis.Transport):
    """`redis://` and `rediss://`."""

    Channel = _Channel


class SentinelTransport(_CarefulTransport, redis.SentinelTransport):
    """`sentinel://`."""

    Channel = _SentinelChannel


def install() -> None:
    """Let this process's Celery use these transports."""
    TRANSPORT_ALIASES["redis"] = TRANSPORT_ALIASES["rediss"] = f"{__name__}:Transport"
    TRANSPORT_ALIASES["sentinel"] = f"{__name__}:SentinelTransport"
    # kombu has no other place between the socket and the message.
    setattr(redis, "loads", _read)  # noqa: B010


def _read(text: Any) -> Any:
    """Read a message's JSON; what cannot be read is no message."""
    loads: Any = json.loads
    try:
        return loads(text)
    except Exception:
        return text
