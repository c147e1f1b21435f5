"""The bell and the relay on a real RabbitMQ: what they promise on Redis, they promise here."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection
from sqlalchemy import select, text

from sutazai import admission, db, statements
from sutazai.bell import WINDOW_MIN
from sutazai.broker import RABBITMQ_MARK, direct_queue
from sutazai.keeper import Identity
from sutazai.models import tasks
from sutazai.relay import Relay
from sutazai.settings import override
from sutazai.submission import Options, Submission
from tests.conftest import Servers, free_port
from tests.integration.served import until
from tests.rabbitmq import Node

AGENT = "task-assignment-coordinator"


@pytest.fixture(scope="module")
def app(rabbitmq: Node, migrated: Servers) -> Iterator[Any]:
    """An application of its own: the one that others import knows the broker of its import."""
    from sutazai import celery

    override(broker_url=rabbitmq.url)
    yield celery._create()
    override(broker_url=migrated.broker_url)
    celery.app.set_current()


@pytest.fixture
def bell(app: Any, rabbitmq: Node, database: Servers) -> Iterator[Any]:
    from sutazai.ringer import CeleryBell

    made = CeleryBell(app)
    worker = Identity(f"{AGENT}@here", AGENT, "here")
    with db.transaction() as connection:
        connection.execute(statements.enlist({**worker.row, "slots": 2}))
    yield made
    made.close()
    with Connection(rabbitmq.url) as connection:
        for queue in (AGENT, RABBITMQ_MARK):
            connection.default_channel.queue_delete(queue)


@pytest.fixture
def channel(rabbitmq: Node) -> Iterator[Any]:
    with Connection(rabbitmq.url) as connection:
        yield connection.default_channel


def submission(app: Any, **options: Any) -> Submission:
    from sutazai.tasks import load

    return Submission(load().get(AGENT).get("describe"), {}, Options(**options))


def accept(app: Any, count: int = 1, **options: Any) -> None:
    with db.transaction() as connection:
        for _ in range(count):
            admission.accept(connection, submission(app, **options), rung=False)


def rings() -> list[int]:
    with db.transaction() as connection:
        return sorted(connection.execute(select(tasks.c.rings)).scalars())


def age(seconds: float) -> None:
    """Let the last ring of every task be so long ago."""
    with db.transaction() as connection:
        aged = "UPDATE tasks SET next_ring_at = next_ring_at - make_interval(secs => :seconds)"
        connection.execute(text(aged), {"seconds": seconds})


def lie(bell: Any, count: int) -> None:
    """Wait until so many notices lie on the queue: it counts what has come a moment later."""
    bell.close()  # publishes what is in hand
    until(lambda: bell.depth(AGENT) == count)


def pass_once(relay: Relay) -> int:
    """Let the relay do one pass while the worker lives, however long the broker took."""
    with db.transaction() as connection:
        connection.execute(text("UPDATE workers SET heartbeat_at = now()"))
    return relay.round()


def ping(app: Any) -> Any:
    """Ask workers by remote control, on a connection that is kept."""
    from sutazai.celery import ask_workers

    def ask(*, reply: bool, timeout: float) -> Any:
        return app.control.broadcast("ping", reply=reply, timeout=min(timeout, 0.1))

    return ask_workers(ask)


def fetch(app: Any, channel: Any, count: int) -> list[Any]:
    queue = app.amqp.queues[AGENT](channel)
    return [queue.get(no_ack=True) for _ in range(count)]


def test_urgent_notices_are_served_first_whatever_came_first(
    app: Any, bell: Any, channel: Any
) -> None:
    relay = Relay(bell)
    for priority in (1, 5, 9, 0):
        accept(app, priority=priority)
        pass_once(relay)
    lie(bell, 4)
    assert [message.properties["priority"] for message in fetch(app, channel, 4)] == [9, 5, 1, 0]


def test_a_notice_names_its_task_and_no_more(app: Any, bell: Any, channel: Any) -> None:
    accept(app)
    pass_once(Relay(bell))
    lie(bell, 1)
    [message] = fetch(app, channel, 1)
    with db.transaction() as connection:
        task_id = connection.execute(select(tasks.c.task_id)).scalar_one()
    assert message.headers["id"] == str(task_id)
    assert json.loads(message.body)[:2] == [[], {}]


def test_the_queue_holds_no_more_than_its_window(app: Any, bell: Any) -> None:
    accept(app, WINDOW_MIN + 50)
    relay = Relay(bell)
    assert pass_once(relay) == WINDOW_MIN
    lie(bell, WINDOW_MIN)
    assert pass_once(relay) == 0
    until(lambda: not bell.room(AGENT, 5))
    assert bell.room(AGENT, 9)  # whose level is empty


def test_what_a_front_rings_counts_at_once(
    app: Any, bell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Measured once: a row that is accepted, and not yet rung, would be counted twice.
    monkeypatch.setattr("sutazai.ringer.SOON_S", 600.0)
    monkeypatch.setattr("sutazai.ringer.OUTDATED_S", 600.0)
    bell.room(AGENT, 5)
    until(lambda: AGENT in bell._depths)
    rung = 0
    while bell.room(AGENT, 5):
        sent = submission(app)
        with db.transaction() as connection:
            admission.accept(connection, sent, rung=True)
        bell.ring([sent.notice])
        rung += 1
    assert rung == WINDOW_MIN
    lie(bell, WINDOW_MIN)


def test_work_for_one_host_goes_to_its_worker_alone(app: Any, bell: Any, channel: Any) -> None:
    for priority in (1, 9):
        accept(app, priority=priority)
    with db.transaction() as connection:
        connection.execute(text("UPDATE tasks SET host = 'here'"))
    direct = direct_queue(f"{AGENT}@here", app.amqp.queues[AGENT])(channel)
    direct.declare()
    assert pass_once(Relay(bell)) == 2
    bell.close()
    until(lambda: direct.queue_declare(passive=True).message_count == 2)
    assert bell.depth(AGENT) == 0
    assert [direct.get(no_ack=True).properties["priority"] for _ in range(2)] == [9, 1]
    direct.delete()


def test_queues_have_priorities_and_outlive_a_restart(app: Any, bell: Any, channel: Any) -> None:
    assert bell.depth(AGENT) == 0
    arguments = {"x-max-priority": 9, "x-queue-type": "classic"}
    # RabbitMQ compares when a queue is made again.
    channel.queue_declare(AGENT, durable=True, auto_delete=False, arguments=arguments)


@pytest.mark.parametrize("loss", ["queue_purge", "queue_delete"])
def test_a_lost_queue_is_rung_again(app: Any, bell: Any, channel: Any, loss: str) -> None:
    accept(app, 3)
    relay = Relay(bell)
    pass_once(relay)
    lie(bell, 3)
    getattr(channel, loss)(AGENT)
    assert pass_once(relay) == 0  # workers may hold notices of an empty queue: not at once
    age(15)
    until(lambda: pass_once(relay) == 3)
    lie(bell, 3)
    assert rings() == [2, 2, 2]


def test_a_batch_for_a_queue_that_is_gone_is_noticed(app: Any, bell: Any, channel: Any) -> None:
    accept(app)
    relay = Relay(bell)
    pass_once(relay)
    lie(bell, 1)
    channel.queue_delete(AGENT)
    # The bell's thread has declared the queue, and believes that it is there.
    sent = submission(app)
    with db.transaction() as connection:
        admission.accept(connection, sent, rung=True)
    bell.ring([sent.notice])
    lie(bell, 1)
    assert rings() == [1, 1]


def test_a_restart_is_noticed_and_what_was_out_is_rung_again(
    app: Any, bell: Any, rabbitmq: Node
) -> None:
    accept(app, 2)
    relay = Relay(bell)
    pass_once(relay)
    lie(bell, 2)
    assert bell.forgotten() is None
    assert ping(app) == []
    rabbitmq.stop(kill=True)
    assert bell.forgotten() is None  # it does not answer, which tells nothing
    assert pass_once(relay) == 0
    rabbitmq.forget()
    rabbitmq.start()
    until(lambda: pass_once(relay) == 2)
    lie(bell, 2)
    assert pass_once(relay) == 0
    assert rings() == [2, 2]
    assert ping(app) == []  # no worker runs, but the question was put


def test_a_frozen_broker_delays_a_notice_and_nobody_who_rings(
    app: Any, bell: Any, rabbitmq: Node
) -> None:
    accept(app)
    relay = Relay(bell)
    pass_once(relay)
    lie(bell, 1)
    rabbitmq.freeze()
    try:
        began = time.monotonic()
        sent = submission(app)
        bell.room(AGENT, 5)
        with db.transaction() as connection:
            admission.accept(connection, sent, rung=True)
        bell.ring([sent.notice])
        assert time.monotonic() - began < 0.5
        assert bell.depth(AGENT) is None
        bell.close(10)
        assert time.monotonic() - began < 8
        assert rings() == [0, 1]  # so it is due again in a second
    finally:
        rabbitmq.resume()
    age(1)
    until(lambda: pass_once(relay) == 1)
    # The first one had been written to the connection before that was given up.
    until(lambda: (bell.depth(AGENT) or 0) >= 2)


def test_an_unreachable_broker_costs_a_second_not_a_task(app: Any, bell: Any) -> None:
    nowhere = f"amqp://127.0.0.1:{free_port()}//"
    options = app.conf.broker_transport_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            app,
            "connection_for_write",
            lambda: Connection(nowhere, transport_options=options),
        )
        sent = submission(app)
        with db.transaction() as connection:
            admission.accept(connection, sent, rung=True)
        bell.ring([sent.notice])
        bell.close(10)
    assert rings() == [0]
