"""Faults of our own processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import subprocess
from typing import Any
from uuid import uuid4

import httpx

from tests.acceptance.conftest import BIN
from tests.faults.fault import fault
from tests.faults.load import LONG_PAUSE_S
from tests.faults.place import WORKER, Place, frozen, kill, last, until


@fault("kill -9 of a pool child")
def kill_child(place: Place, chance: random.Random) -> None:
    kill(chance.choice(place.children()))


@fault("kill -9 of a worker")
def kill_worker(place: Place, _: random.Random) -> None:
    kill(place.process(WORKER))


@fault("kill -9 of a worker and its pool")
def kill_group(place: Place, _: random.Random) -> None:
    for process in [place.process(WORKER), *place.children()]:
        kill(process)


@fault("kill -9 of the front")
def kill_front(place: Place, _: random.Random) -> None:
    kill(place.process("front"))


@fault("kill -9 of the relay")
def kill_relay(place: Place, _: random.Random) -> None:
    kill(place.process("relay"))


@fault("kill -9 of Beat")
def kill_beat(place: Place, _: random.Random) -> None:
    kill(place.process("beat"))


@fault("SIGTERM of a worker")
def drain_worker(place: Place, _: random.Random) -> None:
    place.process(WORKER).terminate()


@fault("SIGSTOP of a worker and its pool for 45 s", is_long=True, pause_s=LONG_PAUSE_S)
def freeze_worker(place: Place, _: random.Random) -> None:
    with frozen(place.process(WORKER), *place.children()):
        last(45)


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
    last(2)
    for process in running:
        process.terminate()
    for process in running:
        process.wait(30)


@fault("an action that kills its own process, with neighbours")
def poison(place: Place, _: random.Random) -> None:
    task_id = place.submit("crash", str(uuid4()))
    place.await_state(task_id, "failed", 60)
    code, crashes = (
        place.value(f"SELECT {column} FROM tasks WHERE task_id = %s", task_id)
        for column in ("error->>'code'", "crashes")
    )
    assert (code, crashes) == ("poison", 3)


@fault("an action that never ends, while the broker is frozen")
def overrun(place: Place, _: random.Random) -> None:
    task_id = place.submit("spin", str(uuid4()))
    place.await_state(task_id, "running", 30)
    with frozen(place.process("valkey")):
        place.await_state(task_id, "failed", 15)
    outcome = "SELECT outcome FROM attempts WHERE task_id = %s"
    assert place.value(outcome, task_id) == "timed_out"


@fault("cancel of a running task whose worker then dies")
def cancel_thenkill(place: Place, _: random.Random) -> None:
    task_id = place.submit("work", str(uuid4()), seconds=50)
    place.await_state(task_id, "running", 30)
    # Frozen, so that nobody sees the request before they die.
    with frozen(place.process(WORKER), *place.children()) as processes:
        answer = httpx.post(f"{place.url}/tasks/{task_id}/cancel", timeout=10)
        assert answer.status_code == 202
        for process in processes:
            kill(process)
    place.await_state(task_id, "cancelled", 40)


@fault("kill -9 of the front while it waits for a task that waits for its child")
def kill_waiting_front(place: Place, _: random.Random) -> None:
    key = str(uuid4())
    body = {"action": "pass_on", "seconds": 1.0}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = pool.submit(_ask, place, key, body)
        found = "SELECT task_id::text FROM tasks WHERE idempotency_key = %s AND state = 'waiting'"
        parent = until(lambda: place.value(found, key), 30, "the child runs")
        kill(place.process("front"))
        assert asked.result() is None, "the front has answered before it was killed"
    place.await_state(parent, "succeeded", 30)
    assert place.submit("pass_on", key, seconds=1.0) == parent
    assert place.value("SELECT count(*) FROM tasks WHERE parent_id = %s", parent) == 1


def _ask(place: Place, key: str, body: dict[str, Any]) -> httpx.Response | None:
    """Ask for a result and wait for it; None when the connection broke."""
    headers = {"Idempotency-Key": key}
    with contextlib.suppress(httpx.HTTPError):
        return httpx.post(f"{place.url}/process", json=body, headers=headers, timeout=30)
    return None


@fault("SIGTERM of everything, and a new start")
def restart_all(place: Place, _: random.Random) -> None:
    _restart_charging_nothing(place)


@fault(
    "SIGTERM of everything while tasks run longer than a drain, and a new start",
    is_long=True,
    pause_s=LONG_PAUSE_S,
)
def restart_amid_long_tasks(place: Place, _: random.Random) -> None:
    long = [place.submit("work", str(uuid4()), seconds=40) for _ in range(2)]
    for task_id in long:
        place.await_state(task_id, "running", 30)
    _restart_charging_nothing(place)
    for task_id in long:
        released = "SELECT count(*) FROM attempts WHERE task_id = %s AND outcome = 'released'"
        assert place.value(released, task_id) == 1
        place.await_state(task_id, "succeeded", 90)


def _restart_charging_nothing(place: Place) -> None:
    before = place.value("SELECT now()")
    charged = place.value(_CHARGED)
    place.restart()
    assert place.value(_CHARGED) == charged, "tasks were charged for a stop"
    assert place.value("SELECT count(*) FROM workers WHERE stopped_at > %s", before) > 0


_CHARGED = "SELECT coalesce(sum(failures + crashes), 0) FROM tasks"
