"""Redis as Celery's broker, read so that no message can end the worker that takes it.

Whatever lies on a queue comes from whoever may write there. kombu lets a message that it cannot
read raise through the consumer's loop, and Celery then ends its worker.
"""

from __future__ import annotations

from queue import Empty
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis

from sutazai import log

_logger = log.get(__name__)


class _Careful:
    """What both kinds of channel add to kombu's."""

    connection: Any

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Any, *args: Any, **more: Any
    ) -> None:
        """Consume from a queue; a message that cannot be handled is dropped."""

        def receive(message: Any) -> Any:
            try:
                return callback(message)
            except self._faults:
                raise
            except Exception:
                _logger.exception("dropped a message that cannot be handled", queue=queue)
                if not message.acknowledged:
                    message.reject()  # else it would take up a place among those in hand

        kombu: Any = super()
        kombu.basic_consume(queue, no_ack, receive, *args, **more)

    def _brpop_read(self, **options: Any) -> Any:
        kombu: Any = super()
        try:
            return kombu._brpop_read(**options)
        except self._faults:
            raise
        except Exception as error:
            # It is off the queue already; what remains is to go on with the next one.
            _logger.warning("dropped a message that cannot be read", why=repr(error)[:500])
            return True

    @property
    def _faults(self) -> Any:
        """What tells of the connection, and not of a message."""
        transport = self.connection
        return (Empty, *transport.connection_errors, *transport.channel_errors)


class _Channel(_Careful, redis.Channel):
    """A channel to Redis."""


class _SentinelChannel(_Careful, redis.SentinelChannel):
    """A channel to a Redis that Sentinels watch over."""


class Transport(redis.Transport):
    """`redis://` and `rediss://`."""

    Channel = _Channel


class SentinelTransport(redis.SentinelTransport):
    """`sentinel://`."""

    Channel = _SentinelChannel


def install() -> None:
    """Let this process's Celery use these transports."""
    TRANSPORT_ALIASES["redis"] = TRANSPORT_ALIASES["rediss"] = f"{__name__}:Transport"
    TRANSPORT_ALIASES["sentinel"] = f"{__name__}:SentinelTransport"
