"""The faults, each a function that injects it into a system under load and lets it heal."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

import httpx
import psutil
import psycopg
import redis

from sutazai.bell import NOTICE_HEADER
from tests.acceptance.conftest import BIN
from tests.faults.place import AGENT, Place, until

Inject = Callable[[Place, random.Random], None]

WORKER = f"worker-{AGENT}"

ACCEPT_WITHIN_S = 1.0
"""Promised while the broker is frozen."""

REFUSE_WITHIN_S = 3.0
"""Promised while PostgreSQL is away."""


@dataclass(frozen=True)
class Fault:
    """One way in which the world goes wrong."""

    name: str
    inject: Inject
    is_long: bool = False
    """Only in the long form."""


FAULTS: list[Fault] = []


def fault(name: str, *, is_long: bool = False) -> Callable[[Inject], Inject]:
    """Add a function to the catalogue."""

    def add(inject: Inject) -> Inject:
        FAULTS.append(Fault(name, inject, is_long))
        return inject

    return add


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it was quicker
        process.kill()


def _children(place: Place) -> list[psutil.Process]:
    def find() -> list[psutil.Process]:
        try:
            return list(place.process(WORKER).children())
        except psutil.NoSuchProcess:
            return []

    found: list[psutil.Process] = until(find, 30, "the worker has a pool")
    return found


# --- processes ------------------------------------------------------------------------------


@fault("kill -9 of a pool child")
def kill_child(place: Place, chance: random.Random) -> None:
    _kill(chance.choice(_children(place)))


@fault("kill -9 of a worker")
def kill_worker(place: Place, _: random.Random) -> None:
    _kill(place.process(WORKER))


@fault("kill -9 of a worker and its pool")
def kill_group(place: Place, _: random.Random) -> None:
    for process in [place.process(WORKER), *_children(place)]:
        _kill(process)


@fault("kill -9 of the front")
def kill_front(place: Place, _: random.Random) -> None:
    _kill(place.process("front"))


@fault("kill -9 of the relay")
def kill_relay(place: Place, _: random.Random) -> None:
    _kill(place.process("relay"))


@fault("kill -9 of Beat")
def kill_beat(place: Place, _: random.Random) -> None:
    _kill(place.process("beat"))


@fault("SIGTERM of a worker")
def drain_worker(place: Place, _: random.Random) -> None:
    place.process(WORKER).terminate()


@fault("SIGSTOP of a worker and its pool for 45 s", is_long=True)
def freeze_worker(place: Place, _: random.Random) -> None:
    frozen = [place.process(WORKER), *_children(place)]
    for process in frozen:
        process.suspend()
    _pass(45)
    for process in frozen:
        process.resume()


@fault("a second relay and a second Beat")
def run_twice(place: Place, _: random.Random) -> None:
    running = [
        subprocess.Popen(
            [BIN / "sutazai", name],
            env=place.system.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name in ("relay", "beat")
    ]
    until(lambda: place.value("SELECT count(*) FROM services") >= 4, 30, "two of each serve")
    _pass(2)
    for process in running:
        process.terminate()
    for process in running:
        process.wait(30)


@fault("an action that kills its own process, with neighbours")
def poison(place: Place, _: random.Random) -> None:
    task_id = place.submit("crash", str(uuid4()))
    until(lambda: place.state(task_id) == "failed", 60, "the task is poison")
    code, crashes = (
        place.value(f"SELECT {column} FROM tasks WHERE task_id = %s", task_id)
        for column in ("error->>'code'", "crashes")
    )
    assert (code, crashes) == ("poison", 3)


@fault("an action that never ends, while the broker is frozen")
def overrun(place: Place, _: random.Random) -> None:
    task_id = place.submit("spin", str(uuid4()))
    until(lambda: place.state(task_id) == "running", 30, "it runs")
    broker = place.process("valkey")
    broker.suspend()
    try:
        until(lambda: place.state(task_id) == "failed", 15, "it was ended at its limit")
    finally:
        broker.resume()
    outcome = "SELECT outcome FROM attempts WHERE task_id = %s"
    assert place.value(outcome, task_id) == "timed_out"


@fault("cancel of a running task whose worker then dies")
def cancel_then_kill(place: Place, _: random.Random) -> None:
    task_id = place.submit("work", str(uuid4()), seconds=50)
    until(lambda: place.state(task_id) == "running", 30, "it runs")
    frozen = [place.process(WORKER), *_children(place)]
    for process in frozen:
        process.suspend()  # so that nobody sees the request before they die
    answer = httpx.post(f"{place.url}/tasks/{task_id}/cancel", timeout=10)
    assert answer.status_code == 202
    for process in frozen:
        _kill(process)
    until(lambda: place.state(task_id) == "cancelled", 40, "it is cancelled")


# --- the broker -----------------------------------------------------------------------------


@fault("FLUSHALL")
def flush(place: Place, chance: random.Random) -> None:
    for _ in range(3):
        place.broker().flushall()
        _pass(chance.uniform(0.1, 0.5))


@fault("CLIENT KILL of every connection, again and again")
def cut_clients(place: Place, _: random.Random) -> None:
    for _ in range(5):
        client = place.broker()
        for kind in ("normal", "pubsub"):
            client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        _pass(0.4)


@fault("kill -9 of the broker, which keeps nothing")
def kill_broker(place: Place, _: random.Random) -> None:
    _kill(place.process("valkey"))
    until(lambda: _answers(place), 30, "the broker is back")


@fault("SIGSTOP of the broker")
def freeze_broker(place: Place, chance: random.Random) -> None:
    broker = place.process("valkey")
    broker.suspend()
    try:
        slowest_s = 0.0
        for _ in range(5):
            began = time.monotonic()
            answer = place.post("work", str(uuid4()))
            slowest_s = max(slowest_s, time.monotonic() - began)
            assert answer.status_code == 202
            _pass(chance.uniform(0.2, 0.6))
    finally:
        broker.resume()
    place.notes["accepted while the broker was frozen, at most"] = slowest_s
    assert slowest_s < ACCEPT_WITHIN_S


@fault("SIGSTOP of the broker for 60 s", is_long=True)
def freeze_broker_long(place: Place, _: random.Random) -> None:
    broker = place.process("valkey")
    broker.suspend()
    _pass(60)
    broker.resume()


@fault("a broker that is full")
def fill_broker(place: Place, _: random.Random) -> None:
    client = place.broker()
    client.config_set("maxmemory", "1")
    _pass(2)
    client.config_set("maxmemory", "0")


@fault("garbage and forged messages on the queue")
def forge(place: Place, chance: random.Random) -> None:
    client = place.broker()
    for body in (b"garbage", b"{}", b"[]", b'{"body": 1, "headers": {}, "properties": {}}'):
        client.lpush(AGENT, body)
        _pass(chance.uniform(0.05, 0.2))
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


# --- PostgreSQL -----------------------------------------------------------------------------


@fault("all sessions of PostgreSQL terminated")
def end_sessions(place: Place, _: random.Random) -> None:
    for _ in range(3):
        with place.database(superuser=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE usename = 'sutazai' AND pid <> pg_backend_pid()"
            )
        _pass(0.3)


@fault("kill -9 of a session's process, so that PostgreSQL recovers")
def kill_session(place: Place, chance: random.Random) -> None:
    with place.database(superuser=True) as connection:
        found = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE usename = 'sutazai'"
        ).fetchall()
    os.kill(chance.choice(found)[0], signal.SIGKILL)


@fault("immediate stop and restart of PostgreSQL")
def stop_database(place: Place, _: random.Random) -> None:
    server = place.process("postgresql")
    server.send_signal(signal.SIGQUIT)  # PostgreSQL's immediate shutdown
    server.wait(20)
    began = time.monotonic()
    refused = 0
    while time.monotonic() - began < 20:
        asked_at = time.monotonic()
        answer = place.post("work", str(uuid4()))
        took_s = time.monotonic() - asked_at
        assert took_s < REFUSE_WITHIN_S
        if answer.status_code == 202:
            break
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers
        refused += 1
        place.notes["refused while PostgreSQL was away, at most"] = max(
            took_s, place.notes.get("refused while PostgreSQL was away, at most", 0.0)
        )


@fault("a locked table")
def lock_table(place: Place, _: random.Random) -> None:
    with place.database(superuser=True) as connection, connection.transaction():
        connection.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
        _pass(3)


@fault("PostgreSQL in read-only mode")
def make_read_only(place: Place, _: random.Random) -> None:
    def switch(mode: str) -> None:
        with place.database(superuser=True) as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(f"ALTER DATABASE sutazai SET default_transaction_read_only = {mode}")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE usename = 'sutazai' AND pid <> pg_backend_pid()"
            )

    switch("on")
    _pass(3)
    switch("off")


@fault("all connections of PostgreSQL used up")
def use_up_connections(place: Place, _: random.Random) -> None:
    held = []
    url = place.env["SUTAZAI_DATABASE_URL"]
    with place.database(superuser=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE usename = 'sutazai' AND state = 'idle'"
        )
    try:
        while len(held) < 1000:
            held.append(psycopg.connect(url, connect_timeout=2))
    except psycopg.OperationalError:
        pass  # there are no more
    _pass(3)
    for connection in held:
        connection.close()


def _answers(place: Place) -> bool:
    try:
        return bool(place.broker().ping())
    except (redis.RedisError, OSError):
        return False


def _pass(seconds: float) -> None:
    """Let a fault last for so long."""
    time.sleep(seconds)
