"""The whole system with RabbitMQ as its broker, as its users see it and under faults."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest
import redis
from celery import Celery
from kombu import Connection, Exchange, Queue

from tests.faults.catalogue.broker import ACCEPT_WITHIN_S
from tests.faults.catalogue.processes import kill_group
from tests.faults.fault import Fault, Inject
from tests.faults.place import AGENT, WORKER, Kind, Place, until
from tests.faults.run import run
from tests.rabbitmq import Node

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def place(rabbitmq: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("rabbitmq")
    opened = Place.open(folder, flower=True, SUTAZAI_BROKER_URL=rabbitmq.url)
    # From now on commands must find the broker in the home.
    del opened.system.env["SUTAZAI_BROKER_URL"]
    yield opened
    assert opened.close() == 0


@pytest.fixture(scope="module")
def foreign(rabbitmq: Node, place: Place) -> Iterator[Celery]:
    """A program without our application."""
    with Celery(broker=rabbitmq.url) as app:
        yield app


@pytest.fixture
def channel(rabbitmq: Node) -> Iterator[Any]:
    with Connection(rabbitmq.url) as connection:
        yield connection.default_channel


def health(place: Place) -> Any:
    return httpx.get(f"{place.url}/health", timeout=5).json()


def command(foreign: Celery, name: str, *arguments: Any) -> None:
    [answer] = getattr(foreign.control, name)(*arguments, reply=True, timeout=10, limit=1)
    assert all("ok" in told for told in answer.values()), answer


def succeeded(place: Place, *task_ids: str) -> None:
    for task_id in task_ids:
        place.await_state(task_id, "succeeded", 30)


def test_valkey_serves_what_is_no_broker(place: Place, rabbitmq: Node) -> None:
    env = place.env
    assert env["SUTAZAI_BROKER_URL"] == rabbitmq.url
    succeeded(place, place.submit("work", str(uuid4())))
    until(lambda: health(place)["status"] == "healthy", 20, "all is well")
    assert health(place)["checks"]["broker"] == health(place)["checks"]["redis"] == "ok"
    with redis.Redis.from_url(env["SUTAZAI_REDIS_URL"]) as client:
        until(lambda: client.hexists("agents:registry", AGENT), 20, "it is in the registry")
        assert client.keys(f"{AGENT}*") == client.keys("_kombu*") == []


def test_commands_find_the_broker_in_the_home(place: Place) -> None:
    celery = ("celery", "-A", "sutazai")
    commands = {
        "ping": (*celery, "inspect", "ping"),
        "call": (*celery, "call", f"{AGENT}.work"),
        "status": ("sutazai", "status", "--json"),
        "doctor": ("sutazai", "doctor", "--json"),
    }
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda name: place.system.run(*commands[name]), commands)
        ran = dict(zip(commands, done, strict=True))
    assert [ran[name].returncode for name in commands] == [0, 0, 0, 0], ran
    assert f"{AGENT}@" in ran["ping"].stdout
    succeeded(place, ran["call"].stdout.strip())
    [row] = json.loads(ran["status"].stdout)
    assert (row["agent"], row["health"]) == (AGENT, "healthy")
    found = {line["subject"]: line for line in json.loads(ran["doctor"].stdout)}
    assert found["broker"]["level"] == "ok"
    assert found["broker"]["text"].startswith("RabbitMQ 3")


def test_flower_sees_the_worker_and_its_tasks(place: Place) -> None:
    base = f"http://127.0.0.1:{5555 + place.system.offset}/api"

    def ask(path: str, **query: str) -> dict[str, Any]:
        answer = httpx.get(f"{base}/{path}", params=query, timeout=20)
        return dict(answer.json()) if answer.is_success else {}

    until(lambda: any(AGENT in name for name in ask("workers", refresh="1")), 30, "the worker")
    done = []

    def saw_one() -> bool:
        done.append(place.submit("work", str(uuid4())))
        seen = ask("tasks")
        return any(seen[known]["state"] == "SUCCESS" for known in done if known in seen)

    until(saw_one, 30, "Flower saw a task")


def test_a_worker_told_to_wait_serves_the_urgent_first(
    place: Place, foreign: Celery, channel: Any
) -> None:
    assert [*foreign.control.inspect(limit=1).ping()] == health(place)["workers"][0:1][0][
        "id"
    ].split()
    command(foreign, "pool_shrink", 1)
    command(foreign, "cancel_consumer", AGENT)
    until(lambda: "consumer cancelled" in str(health(place)["reasons"]), 10, "health tells")
    ids = {}
    for priority in (2, 0, 9, 5, 7):
        answer = httpx.post(
            f"{place.url}/process",
            params={"priority": priority},
            json={"action": "work"},
            headers={"Prefer": "respond-async"},
        )
        ids[priority] = answer.json()["task_id"]
    # The agent's own schedule adds some.
    until(lambda: all(map(_is_out, [place] * len(ids), ids.values())), 10, "all notices are out")
    until(lambda: _lie(channel) >= len(ids), 10, "they lie on the queue")
    command(foreign, "add_consumer", AGENT)
    succeeded(place, *ids.values())
    command(foreign, "pool_grow", 1)
    started = {
        priority: place.value("SELECT started_at FROM tasks WHERE task_id = %s", task_id)
        for priority, task_id in ids.items()
    }
    assert sorted(started, key=lambda priority: started[priority]) == [9, 7, 5, 2, 0]


def test_purged_and_deleted_queues_lose_nothing(
    place: Place, foreign: Celery, channel: Any
) -> None:
    command(foreign, "cancel_consumer", AGENT)
    first = place.submit("work", str(uuid4()))
    until(lambda: _is_out(place, first) and _lie(channel), 10, "its notice is out")
    channel.queue_purge(AGENT)
    _age(place)
    until(lambda: _is_out(place, first, times=2), 10, "it was rung again")
    channel.queue_delete(AGENT)
    command(foreign, "add_consumer", AGENT)
    second = place.submit("work", str(uuid4()))
    _age(place)
    succeeded(place, first, second)
    channel.queue_delete(AGENT)  # under the eyes of the worker that consumes it
    until(lambda: _consumers(channel), 20, "the worker has made it again")
    succeeded(place, place.submit("work", str(uuid4())))


def test_foreign_messages_are_adopted_and_garbage_is_dropped(
    place: Place, foreign: Celery, channel: Any
) -> None:
    worker = place.process(WORKER)
    good, bad = str(uuid4()), str(uuid4())
    for body, kind in (
        (b"garbage", "application/json"),
        (b"\x80\x04N.", "application/x-python-serialize"),
        (b"[]", "application/json"),
        (b"\xff\xfe", "no/such-type"),
    ):
        message = channel.prepare_message(body, content_type=kind, content_encoding="binary")
        channel.basic_publish(message, exchange="", routing_key=AGENT)
    # A program that would declare the queue in its own way is refused by RabbitMQ.
    queue = Queue(AGENT, Exchange("", type="direct"), routing_key=AGENT, no_declare=True)
    for task_id, params in ((bad, {"seconds": "x"}), (good, {"seconds": 0})):
        foreign.send_task(f"{AGENT}.work", kwargs=params, task_id=task_id, queue=queue)
    count = "SELECT count(*) FROM tasks WHERE task_id = %s"
    until(lambda: place.value(count, good), 20, "it was adopted")
    succeeded(place, good)
    assert place.value(count, bad) == 0
    assert place.process(WORKER) == worker
    until(lambda: _lie(channel) == 0, 10, "nothing is left")


def _is_out(place: Place, task_id: str, *, times: int = 1) -> bool:
    return bool(place.value("SELECT rings FROM tasks WHERE task_id = %s", task_id) >= times)


def _lie(channel: Any) -> int:
    return int(channel.queue_declare(AGENT, passive=True).message_count)


def _consumers(channel: Any) -> int:
    try:
        return int(channel.queue_declare(AGENT, passive=True).consumer_count)
    except channel.connection.channel_errors:
        return 0


def _age(place: Place) -> None:
    """Let the last ring of every task be 15 s ago."""
    with place.database() as connection:
        connection.execute("UPDATE tasks SET next_ring_at = next_ring_at - interval '15 s'")


def test_a_frozen_broker_holds_up_nobody_and_is_told(place: Place, rabbitmq: Node) -> None:
    accepted: list[str] = []
    slowest_s = 0.0
    rabbitmq.freeze()
    try:

        def told() -> Any:
            nonlocal slowest_s
            began = time.monotonic()
            answer = place.post("work", str(uuid4()))
            slowest_s = max(slowest_s, time.monotonic() - began)
            assert answer.status_code == 202
            accepted.append(answer.json()["task_id"])
            found = health(place)
            return found if found["checks"]["broker"] != "ok" else None

        found = until(told, 20, "health tells of it")
    finally:
        rabbitmq.resume()
    assert slowest_s < ACCEPT_WITHIN_S
    assert (found["status"], found["checks"]["broker"]) == ("degraded", "does not answer")
    told_as = "The broker does not answer; tasks are accepted and start when it is back."
    assert told_as in found["reasons"]
    succeeded(place, *accepted)
    until(place.is_whole, 20, "all is well again")


def test_a_restart_under_load_loses_nothing(place: Place, rabbitmq: Node) -> None:
    def restart(place: Place, _: random.Random) -> None:
        rabbitmq.stop()
        rabbitmq.start()

    _survive(place, restart)


def test_kill_9_of_a_worker_and_its_pool_under_load_loses_nothing(place: Place) -> None:
    _survive(place, kill_group)


def _survive(place: Place, inject: Inject) -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}")  # noqa: T201 - to be replayed
    fault = Fault(inject.__name__, inject, Kind.PLAIN)
    done = run(place, fault, seed, runs=1, seconds=0.5)
    assert done.is_good, str(done)
