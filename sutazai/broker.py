"""What the brokers differ in: order, depth, and how the loss of their queues is noticed.

Everything else that touches a broker is kombu's and the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from amqp.exceptions import NotFound
from celery import Celery
from celery.utils.nodenames import worker_direct
from kombu.common import maybe_declare
from kombu.connection import Connection
from kombu.entity import TRANSIENT_DELIVERY_MODE, Exchange, Queue

from sutazai import db, statements

REDIS_MARK = "sutazai:broker"
"""Holds the run id of the Redis that is the broker. Gone or different, it has lost its queues."""

RABBITMQ_MARK = "sutazai.mark"
"""A queue that holds one message, which a restart of RabbitMQ forgets. Empty or gone, it has."""


DIRECT_KEPT_S = 3600
"""So long RabbitMQ keeps the queue of a worker that has gone: hosts of containers do not return."""


def direct_queue(node: str, own: Any) -> Queue:
    """Return the queue of one worker, for work that only its host can do, made as its agent's."""
    name = direct_name(node)
    return Queue(
        name,
        own.exchange,
        routing_key=name,
        queue_arguments=own.queue_arguments,
        expires=DIRECT_KEPT_S,
    )


def direct_name(node: str) -> str:
    """Return the name of the queue of one worker."""
    name: str = worker_direct(node).name
    return name


class Broker(Protocol):
    """One kind of broker. Whoever calls holds the connection, and expects its driver's errors."""

    def rank(self, priority: int) -> int:
        """Turn our priority (9 most urgent) into the broker's."""

    def declare(self, connection: Connection, agents: Iterable[str]) -> None:
        """See to it that the queues of agents exist, once a connection."""

    def confirm(self, connection: Connection, agents: Iterable[str]) -> None:
        """Return when the broker has read what was published; raise when it does not answer."""

    def depth(self, connection: Connection, agent: str) -> int:
        """Return how many messages lie on a queue."""

    def levels(self, connection: Connection, agent: str, together: int) -> dict[int, int]:
        """Return how many notices of each of our priorities are out.

        together: how many of them one message may hold.
        """

    def forgotten(self, connection: Connection) -> str | None:
        """See `Bell.forgotten`."""

    def remember(self, connection: Connection, life: str) -> None:
        """See `Bell.remember`."""


def broker_of(app: Celery) -> Broker:
    """Return the kind of broker that an application uses."""
    is_amqp = app.connection_for_write().transport.driver_type == "amqp"
    return OnRabbitMQ(app) if is_amqp else OnRedis()


class OnRedis:
    """Redis or Valkey: kombu keeps a list for each priority of a queue, and 0 is served first."""

    def rank(self, priority: int) -> int:
        """Turn our priority into a level."""
        return 9 - priority

    def declare(self, connection: Connection, agents: Iterable[str]) -> None:
        """Do nothing: the first notice makes the list."""

    def confirm(self, connection: Connection, agents: Iterable[str]) -> None:
        """Do nothing: Redis has answered each command."""

    def depth(self, connection: Connection, agent: str) -> int:
        """Add the lengths of the lists."""
        return sum(self.levels(connection, agent, 1).values())

    def levels(self, connection: Connection, agent: str, together: int) -> dict[int, int]:
        """Return what the lists may hold: a guess too high only makes later what would wait."""
        channel: Any = connection.default_channel
        with channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for step in channel.priority_steps:
                pipe.llen(channel._q_for_pri(agent, step))
            lengths = pipe.execute()
        found = zip(channel.priority_steps, lengths, strict=True)
        return {9 - step: length * together for step, length in found}

    def forgotten(self, connection: Connection) -> str | None:
        """Compare the server's run id with the one that our key holds."""
        channel: Any = connection.default_channel
        with channel.conn_or_acquire() as client:
            life = client.info("server")["run_id"]
            return None if client.get(REDIS_MARK) == life.encode() else str(life)

    def remember(self, connection: Connection, life: str) -> None:
        """Write the run id that `forgotten` has seen."""
        channel: Any = connection.default_channel
        with channel.conn_or_acquire() as client:
            client.set(REDIS_MARK, life)


class OnRabbitMQ:
    """RabbitMQ: one queue with priorities, of which 9 is served first."""

    def __init__(self, app: Celery) -> None:
        self._queues = app.amqp.queues

    def rank(self, priority: int) -> int:
        """Leave it as it is."""
        return priority

    def declare(self, connection: Connection, agents: Iterable[str]) -> None:
        """Make the queues, because a notice for a queue that is not there vanishes silently.

        Those of agents that this process does not know are left to their workers.
        """
        for agent in agents:
            if agent in self._queues:
                maybe_declare(self._queues[agent], connection.default_channel)

    def confirm(self, connection: Connection, agents: Iterable[str]) -> None:
        """Ask for the queues: a channel is served in order, so the answer follows the notices.

        A queue that somebody has deleted meanwhile raises, and is made again at the next try.
        """
        for agent in agents:
            self._count(connection, agent)

    def depth(self, connection: Connection, agent: str) -> int:
        """Ask for the queue; what workers hold but have not begun is not counted."""
        self.declare(connection, [agent])
        return self._count(connection, agent)

    def levels(self, connection: Connection, agent: str, together: int) -> dict[int, int]:  # noqa: ARG002
        """Count rows that were rung: RabbitMQ has one depth for all priorities of a queue."""
        return {row.priority: row.notices for row in db.run(statements.count_rung(agent))}

    def forgotten(self, connection: Connection) -> str | None:
        """Look for the marking message."""
        try:
            return None if self._count(connection, RABBITMQ_MARK) else "unmarked"
        except NotFound:
            return "unmarked"

    def remember(self, connection: Connection, life: str) -> None:  # noqa: ARG002
        """Publish the marking message, and wait until it lies in its queue."""
        Queue(
            RABBITMQ_MARK,
            Exchange("", type="direct"),
            durable=True,
            queue_arguments={"x-queue-type": "classic", "x-max-length": 1},
        )(connection.default_channel).declare()
        with connection.channel() as confirming:
            forgettable = {"delivery_mode": TRANSIENT_DELIVERY_MODE}
            mark = confirming.prepare_message(b"", properties=forgettable)
            confirming.basic_publish_confirm(mark, exchange="", routing_key=RABBITMQ_MARK)

    @staticmethod
    def _count(connection: Connection, queue: str) -> int:
        count: int = connection.default_channel.queue_declare(queue, passive=True).message_count
        return count
