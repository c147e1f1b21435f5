"""Faults of the broker and of what stands in its queues."""

from __future__ import annotations

import base64
import json
import random
import time
from uuid import uuid4

import redis

from sutazai.bell import NOTICE_HEADER
from sutazai.broker import REDIS_MARK
from sutazai.embedded import Layout
from tests.faults.fault import fault
from tests.faults.load import LONG_PAUSE_S
from tests.faults.place import AGENT, WORKER, Place, frozen, kill, last, until

ACCEPT_WITHIN_S = 1.0
"""Promised while the broker is frozen."""


@fault("FLUSHALL")
def flush(place: Place, chance: random.Random) -> None:
    for _ in range(3):
        place.broker().flushall()
        last(chance.uniform(0.1, 0.5))


@fault("CLIENT KILL of every connection, again and again")
def cut_clients(place: Place, _: random.Random) -> None:
    for _ in range(5):
        client = place.broker()
        for kind in ("normal", "pubsub"):
            client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        last(0.4)


@fault("kill -9 of the broker, which keeps nothing")
def kill_broker(place: Place, _: random.Random) -> None:
    kill(place.process("valkey"))
    until(lambda: _answers(place), 30, "the broker is back")


@fault("kill -9 of the broker, which comes back with an old dump")
def restore_broker(place: Place, chance: random.Random) -> None:
    client = place.broker()
    with frozen(place.process(WORKER), *place.children()):
        until(lambda: _queues(client) and client.exists(REDIS_MARK), 20, "notices wait")
        client.save()
    last(chance.uniform(0.5, 1.5))
    try:
        kill(place.process("valkey"))
        until(lambda: _answers(place), 30, "the broker is back")
        assert place.broker().info("persistence")["rdb_last_load_keys_loaded"] >= 2
    finally:
        (Layout(place.stores).valkey / "dump.rdb").unlink()


def _queues(client: redis.Redis) -> list[bytes]:
    """Return the lists of notices that are not empty, one a priority."""
    return [key for key in client.keys(f"{AGENT}*") if client.type(key) == b"list"]


@fault("SIGSTOP of the broker")
def freeze_broker(place: Place, chance: random.Random) -> None:
    slowest_s = 0.0
    with frozen(place.process("valkey")):
        for _ in range(5):
            began = time.monotonic()
            answer = place.post("work", str(uuid4()))
            slowest_s = max(slowest_s, time.monotonic() - began)
            assert answer.status_code == 202
            last(chance.uniform(0.2, 0.6))
    place.note("accepting while the broker was frozen", slowest_s)
    assert slowest_s < ACCEPT_WITHIN_S


@fault("SIGSTOP of the broker for 60 s", is_long=True, pause_s=LONG_PAUSE_S)
def freeze_broker_long(place: Place, _: random.Random) -> None:
    with frozen(place.process("valkey")):
        last(60)


@fault("a broker that is full")
def fill_broker(place: Place, _: random.Random) -> None:
    client = place.broker()
    client.config_set("maxmemory", "1")
    last(2)
    client.config_set("maxmemory", "0")


@fault("garbage and forged messages on the queue")
def forge(place: Place, chance: random.Random) -> None:
    client = place.broker()
    for body in (b"garbage", b"{}", b"[]", b'{"body": 1, "headers": {}, "properties": {}}'):
        client.lpush(AGENT, body)
        last(chance.uniform(0.05, 0.2))
    for task_id in (str(uuid4()), place.value(_ANY)):
        client.lpush(AGENT, _notice(task_id))


_ANY = "SELECT task_id::text FROM tasks WHERE finished_at IS NOT NULL LIMIT 1"


def _notice(task_id: str) -> bytes:
    """Return a message that looks like a notice of ours: for no task, or one that has ended."""
    body = base64.b64encode(b"[[], {}, {}]").decode()
    headers = {"task": f"{AGENT}.work", "id": task_id, "lang": "py", NOTICE_HEADER: 1}
    properties = {
        "correlation_id": task_id,
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": AGENT},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": str(uuid4()),
    }
    message = {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": properties,
    }
    return json.dumps(message).encode()


def _answers(place: Place) -> bool:
    try:
        return bool(place.broker().ping())
    except (redis.RedisError, OSError):
        return False
