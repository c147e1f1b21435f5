"""A load of keyed tasks over HTTP, each repeated under its key until it is accepted for certain."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx

from tests.faults.place import Place

CLIENTS = 4
PAUSE_S = 0.25
"""Between two tasks of one client, on average."""

LONG_PAUSE_S = 0.5
"""Beside a fault that lasts about a minute, whose backlog is worked off before the next one."""

PROXIED_PAUSE_S = 1.0
"""Where connections also pass through a proxy of ours, which costs more than the system itself."""

SECONDS = (*[0.0] * 18, 0.02, 0.2)
"""What tasks take, by chance: far less than the slots can do, so that backlogs are worked off."""

GIVE_UP_S = 90.0


@dataclass
class Log:
    """What the clients saw."""

    accepted: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Ids by key; more than one would be a key with two tasks."""

    unanswered: list[str] = field(default_factory=list)
    """Keys that never got an answer."""

    unexplained: list[str] = field(default_factory=list)
    """Answers that may not be: a 5xx without a task, other than the documented 503."""

    slowest_s: float = 0.0


class Load:
    """Hands over tasks from several threads while it is entered."""

    def __init__(self, place: Place, seed: int, pause_s: float = PAUSE_S) -> None:
        self.log = Log()
        self._place = place
        self._seed = seed
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self._abandoned = False
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(CLIENTS)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._stopping.set()
        self._abandoned = error is not None
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        chance = random.Random(self._seed * 100 + number)
        with httpx.Client(timeout=8) as client:
            while not self._stopping.wait(chance.uniform(0, 2 * self._pause_s)):
                self._hand_over(client, chance)

    def _hand_over(self, client: httpx.Client, chance: random.Random) -> None:
        key = str(uuid4())
        seconds = chance.choice(SECONDS)
        body = {"action": chance.choice(["work", "work", "pass_on"]), "seconds": seconds}
        until = time.monotonic() + GIVE_UP_S
        while time.monotonic() < until and not self._abandoned:
            task_id = self._ask(client, key, body)
            if task_id is not None:
                with self._lock:
                    self.log.accepted[key].add(task_id)
                if chance.random() < 0.05:
                    self._ask(client, key, body, again=True)
                return
            time.sleep(chance.uniform(0.05, 0.3))
        with self._lock:
            self.log.unanswered.append(key)

    def _ask(
        self, client: httpx.Client, key: str, body: dict[str, Any], *, again: bool = False
    ) -> str | None:
        headers = {"Prefer": "respond-async", "Idempotency-Key": key}
        began = time.monotonic()
        try:
            answer = client.post(f"{self._place.url}/process", json=body, headers=headers)
        except httpx.HTTPError:
            return None  # uncertain: asked again under the same key
        with self._lock:
            self.log.slowest_s = max(self.log.slowest_s, time.monotonic() - began)
            if answer.status_code == 202:
                task_id = str(answer.json()["task_id"])
                if again:
                    self.log.accepted[key].add(task_id)
                return task_id
            documented = answer.status_code == 503 and "Retry-After" in answer.headers
            if not documented:
                self.log.unexplained.append(f"{answer.status_code}: {answer.text[:200]}")
        return None
