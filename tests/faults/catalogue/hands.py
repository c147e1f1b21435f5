"""Faults in the middle of a backlog whose tasks are taken in hand together."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import httpx

from sutazai.bell import PACES_KEY, Pace
from tests.faults.catalogue.database import stop_at_once
from tests.faults.fault import fault
from tests.faults.place import AGENT, WORKER, Place, kill, until

TASKS = 1000
"""Of each action: enough to be still at work when the pace has been learnt."""


@fault("kill -9 of a pool child amid hands", is_long=True, is_busy=True)
def kill_child(place: Place, chance: random.Random) -> None:
    with _hands(place, chance):
        kill(chance.choice(place.children()))


@fault("kill -9 of a worker and its pool amid hands", is_busy=True)
def kill_group(place: Place, chance: random.Random) -> None:
    with _hands(place, chance):
        for process in [place.process(WORKER), *place.children()]:
            kill(process)


@fault("SIGTERM of a worker amid hands", is_long=True, is_busy=True)
def drain(place: Place, chance: random.Random) -> None:
    with _hands(place, chance, charged=0):
        place.process(WORKER).terminate()


@fault("immediate stop and restart of PostgreSQL amid hands", is_long=True, is_busy=True)
def stop_database(place: Place, chance: random.Random) -> None:
    with _hands(place, chance, charged=0):
        stop_at_once(place)


@contextmanager
def _hands(place: Place, chance: random.Random, *, charged: int = 2) -> Iterator[None]:
    """Do something amid a backlog, and judge what became of it.

    charged: how many tasks may have been running in a process that died.
    """
    ids = _hand_over(place)
    until(lambda: _is_taken_together(place, ids), 60, "tasks are taken in hand together")
    time.sleep(chance.uniform(0, 0.2))
    yield
    until(lambda: place.value(_UNFINISHED, ids) == 0, 90, "the backlog is worked off")
    assert place.value(_WRONG, ids) == 0, "some have not succeeded exactly once"
    assert place.value(_CHARGED, ids) <= charged, "tasks were charged that did not run"


def _hand_over(place: Place) -> list[str]:
    """Hand over a backlog as one batch, repeated under its keys until it is accepted."""
    batch = [
        {"action": action, "options": {"idempotency_key": str(uuid4())}}
        for action in ("work", "nothing")
        for _ in range(TASKS)
    ]

    def accept() -> list[str] | None:
        try:
            answer = httpx.post(f"{place.url}/tasks/batch", json=batch, timeout=30)
        except httpx.HTTPError:
            return None
        return answer.json()["task_ids"] if answer.status_code == 202 else None

    found: list[str] = until(accept, 60, "a batch is accepted")
    return found


def _is_taken_together(place: Place, ids: list[str]) -> bool:
    told = place.broker().hget(PACES_KEY, AGENT)
    together = Pace.read(told.decode()).together if told else 1
    if together > 1 or place.value(_LEFT, ids):
        return together > 1
    raise AssertionError("the backlog was worked off before its pace was learnt")


_LEFT = """
    SELECT EXISTS (SELECT 1 FROM tasks WHERE task_id = ANY(%s::uuid[]) AND state = 'queued')
"""

_UNFINISHED = """
    SELECT count(*) FROM tasks WHERE task_id = ANY(%s::uuid[]) AND finished_at IS NULL
"""

_WRONG = """
    SELECT count(*) FROM tasks t WHERE t.task_id = ANY(%s::uuid[]) AND NOT (
        t.state = 'succeeded'
        AND (SELECT count(*) FROM attempts a
             WHERE a.task_id = t.task_id AND a.outcome = 'succeeded') = 1
        AND (SELECT count(*) FROM effects e
             WHERE e.task_id = t.task_id) = CASE t.action WHEN 'work' THEN 1 ELSE 0 END)
"""

_CHARGED = "SELECT count(*) FROM tasks WHERE task_id = ANY(%s::uuid[]) AND crashes + failures > 0"
