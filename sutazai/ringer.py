"""The bell on Celery: publishes notices from a thread of its own, many to a round trip."""

from __future__ import annotations

import atexit
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from celery import Celery
from kombu.connection import Connection
from kombu.exceptions import KombuError

from sutazai import db, log, redis, statements
from sutazai.bell import (
    HAND_HEADER,
    NOTICE_HEADER,
    PACES_KEY,
    WINDOW_MAX,
    WINDOW_MIN,
    Notice,
    Pace,
    above,
    bundled,
)
from sutazai.broker import broker_of, direct_name
from sutazai.errors import DatabaseUnavailable

SECOND_NET_S = 600.0
"""Celery's own hard time limit lies this far beyond the task's, which the keeper enforces.

It frees the slot of an endless action whose keeper hangs, and must end nothing else: not an attempt
that waits for PostgreSQL to take its outcome, nor one that waits until it is alone, which has none.
"""

QUICKLY_S = 1.0
"""What fails sooner than this on an open connection is tried again on a new one.

Most likely the broker has restarted since; a notice too many does no harm.
"""

SILENT_S = 0.5
"""So long a broker that did not answer is not asked again."""

OUTDATED_S = 1.0
"""So old a measured depth may be while there is room and little is rung, or a backlog waits."""

SOON_S = 0.1
"""So old it may be otherwise."""

_MEASURE, _CLOSE = "measure", "close"
"""What the thread is told beside notices."""

_logger = log.get(__name__)

T = TypeVar("T")


class CeleryBell:
    """Publishes notices from a thread of its own, many to a round trip."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._broker = broker_of(app)
        self._waiting: queue.SimpleQueue[Notice | str] = queue.SimpleQueue()
        self._asked: set[str] = set()
        self._depths: dict[str, dict[int, int]] = {}
        self._paces: dict[str, Pace] = {}
        self._measured_at: dict[str, float] = {}
        self._rung_since: dict[str, int] = {}
        self._in_hand = 0
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._connection: Any = None
        self._reading: Any = None
        self._asking = threading.Lock()
        self._silent_until = 0.0

    def room(self, agent: str, priority: int) -> bool:
        """Whether one more notice may be published; see `Bell.room`."""
        has_room = self._has_room(agent, priority)
        # What was rung since may have been claimed long ago; of a backlog the relay takes care.
        is_full = not has_room or self._rung_since.get(agent, 0) >= WINDOW_MIN // 4
        most_s = SOON_S if is_full and not self._pace(agent).is_behind else OUTDATED_S
        age_s = time.monotonic() - self._measured_at.get(agent, -math.inf)
        if age_s > most_s and agent not in self._asked:
            self._asked.add(agent)
            self._start()
            self._waiting.put(_MEASURE)
        return has_room

    def _has_room(self, agent: str, priority: int) -> bool:
        levels = self._depths.get(agent)
        if levels is None:
            return self._in_hand < WINDOW_MIN
        pace, out = self._pace(agent), sum(levels.values())
        if out and priority in above(levels) and self._in_hand < WINDOW_MAX:
            return True
        return not pace.is_behind and out < pace.window

    def depth(self, agent: str) -> int | None:
        """How many messages lie on the queue; see `Bell.depth`."""
        return self._ask(lambda connection: self._broker.depth(connection, agent))

    def levels(self, agent: str) -> Mapping[int, int] | None:
        """About how many notices lie on the queue, by priority; see `Bell.levels`."""
        return self._ask(lambda connection: self._levels(connection, agent))

    def _levels(self, connection: Connection, agent: str) -> dict[int, int]:
        return self._broker.levels(connection, agent, self._pace(agent).together)

    def _pace(self, agent: str) -> Pace:
        return self._paces.get(agent, Pace())

    def forgotten(self) -> str | None:
        """Which life of the broker this is, if it lost its queues; see `Bell.forgotten`."""
        return self._ask(self._broker.forgotten)

    def remember(self, life: str) -> None:
        """Leave a mark; see `Bell.remember`."""
        self._ask(lambda connection: self._broker.remember(connection, life))

    def _ask(self, question: Callable[[Connection], T]) -> T | None:
        """Put a question to the broker, on a connection for this alone; None: it does not answer.

        One that does not answer is left alone for a moment: whoever asks next is told so at once.
        """
        with self._asking:
            if time.monotonic() < self._silent_until:
                return None
            while True:
                began, was_open = time.monotonic(), self._reading is not None
                try:
                    if self._reading is None:
                        self._reading = self._app.connection_for_read()
                    return question(self._reading)
                except self._faults as error:
                    abandon(self._reading)
                    self._reading = None
                    if was_open and time.monotonic() - began < QUICKLY_S:
                        continue
                    _logger.warning("the broker does not answer", error=str(error))
                    self._silent_until = time.monotonic() + SILENT_S
                    return None

    def ring(self, notices: Sequence[Notice], pace: Pace | None = None) -> None:
        """Hand notices to the thread; see `Bell.ring`."""
        self._start()
        for notice in notices:
            if pace is not None:
                self._paces[notice.agent] = pace
            levels = self._depths.get(notice.agent)
            if levels is not None:
                levels[notice.priority] = levels.get(notice.priority, 0) + 1
            self._rung_since[notice.agent] = self._rung_since.get(notice.agent, 0) + 1
            self._in_hand += 1
            self._waiting.put(notice)

    def close(self, timeout_s: float = 5.0) -> None:
        """Publish what is in hand, and end the thread."""
        if self._thread is not None:
            self._waiting.put(_CLOSE)
            self._thread.join(timeout_s)
            self._thread = None

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            with self._lock:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._run, name="bell", daemon=True)
                    self._thread.start()
                    # A short command must not end before its notice is out.
                    atexit.register(self.close)

    def _run(self) -> None:
        closing = False
        while not closing:
            batch, closing = self._next_batch()
            if batch:
                self._publish(batch)
                self._in_hand = max(0, self._in_hand - len(batch))
            if self._asked:
                self._measure()

    def _next_batch(self, most: int = 500) -> tuple[list[Notice], bool]:
        """Wait for something to do; return the notices in hand, and whether to end after them."""
        batch: list[Notice] = []
        item = self._waiting.get()
        with contextlib.suppress(queue.Empty):
            while item is not _CLOSE:
                if isinstance(item, Notice):
                    batch.append(item)
                if len(batch) >= most:
                    return batch, False
                item = self._waiting.get_nowait()
            return batch, True
        return batch, False

    def _publish(self, batch: Sequence[Notice]) -> None:
        while True:
            began, was_open = time.monotonic(), self._connection is not None
            try:
                self._send(batch)
                return
            except self._faults as error:
                self._drop()
                if was_open and time.monotonic() - began < QUICKLY_S:
                    continue
                _logger.warning("the broker does not answer; the relay will ring", error=str(error))
                failed = statements.ring_failed([notice.task_id for notice in batch])
                with contextlib.suppress(DatabaseUnavailable), db.transaction() as connection:
                    connection.execute(failed)
                return

    def _send(self, batch: Sequence[Notice]) -> None:
        producer = self._producer()
        agents = {notice.agent for notice in batch}
        self._broker.declare(producer.connection, agents)
        with producer.batch(max_size=len(batch)):
            for bundle in bundled(batch, lambda agent: self._pace(agent).together):
                _publish(producer, bundle, self._broker.rank(bundle[0].priority))
        self._broker.confirm(producer.connection, agents)

    def _measure(self) -> None:
        """Learn the depths of the queues that were asked about, and the windows."""
        wanted = list(self._asked)
        try:
            connection = self._producer().connection
            for agent in wanted:
                self._depths[agent] = self._levels(connection, agent)
        except self._faults:
            self._drop()
        except DatabaseUnavailable as error:
            _logger.warning("the windows are guessed", reason=str(error))
        paces = redis.attempt(lambda client: client.hgetall(PACES_KEY)) or {}
        self._paces.update((str(agent), Pace.read(str(text))) for agent, text in paces.items())
        self._measured_at.update(dict.fromkeys(wanted, time.monotonic()))
        self._rung_since.update(dict.fromkeys(wanted, 0))
        self._asked.difference_update(wanted)

    def _producer(self) -> Any:
        if self._connection is None:
            self._connection = self._app.connection_for_write()
            self._made = self._app.amqp.Producer(self._connection, auto_declare=False)
        return self._made

    def _drop(self) -> None:
        abandon(self._connection)
        self._connection = None

    @property
    def _faults(self) -> tuple[type[BaseException], ...]:
        return faults(self._app.connection_for_write())


def faults(connection: Connection) -> tuple[type[BaseException], ...]:
    """Return whatever the broker's driver raises when the broker does not answer."""
    transport = connection.transport
    return (KombuError, OSError, *transport.connection_errors, *transport.channel_errors)


def abandon(connection: Connection | None) -> None:
    """Close a connection whose broker may not answer any more."""
    if connection is not None:
        with contextlib.suppress(*faults(connection)):
            connection.collect(socket_timeout=1)


_EMPTY_BODY = '[[], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'


def _publish(producer: Any, bundle: Sequence[Notice], rank: int) -> None:
    """Publish one message for notices of one action and priority."""
    notice, *others = bundle
    task_id = str(notice.task_id)
    hand = {HAND_HEADER: [str(other.task_id) for other in others]} if others else {}
    limits_s = [each.time_limit_s for each in bundle]
    hard_limit_s = None if None in limits_s else sum(filter(None, limits_s)) + SECOND_NET_S
    routing_key = notice.agent
    if notice.host:
        routing_key = direct_name(f"{notice.agent}@{notice.host}")
    producer.publish(
        _EMPTY_BODY,
        exchange="",
        routing_key=routing_key,
        priority=rank,
        content_type="application/json",
        content_encoding="utf-8",
        correlation_id=task_id,
        delivery_mode=2,
        headers={
            "lang": "py",
            "task": f"{notice.agent}.{notice.action}",
            "id": task_id,
            "root_id": task_id,
            "parent_id": None,
            "group": None,
            "retries": 0,
            "eta": None,
            "expires": None,
            "timelimit": [hard_limit_s, None],
            "argsrepr": "",
            "kwargsrepr": notice.summary,
            "origin": "sutazai",
            "ignore_result": True,
            NOTICE_HEADER: 1,
            **hand,
        },
    )
