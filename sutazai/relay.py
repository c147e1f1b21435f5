"""The relay: rings what is due, rescues what is lost, ends what is too late, prunes what is old.

Any number of relays may run: rows are taken with SKIP LOCKED, so a second one is harmless and the
first one's death costs nothing. It heals whatever the broker loses, because the rows are the truth.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sutazai import db, lifecycle, log, redis, statements
from sutazai.agent import RETENTION
from sutazai.bell import PACES_KEY, Bell, Notice, Pace, above, pace
from sutazai.callbacks import Courier
from sutazai.errors import DatabaseBusy, DatabaseUnavailable
from sutazai.settings import settings
from sutazai.tasks import load

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row


IDLE_PASS_S = 1.0
BUSY_PASS_S = 0.1
HEARTBEAT_S = 5.0
RESCUE_EACH_S = 2.0
PRUNE_EACH_S = 60.0
STEADY_S = 10.0
"""Leases are judged only after PostgreSQL has answered for so long: an outage charges nobody."""

SLOW_S = 3.0
"""A transaction that takes longer is an outage too: nobody could extend a lease meanwhile."""

GATHER_S = 0.02
"""What is announced together is seen to together."""

PACE_S = 0.5
"""A queue's pace is measured over so long at least, until its workers tell of claims."""

STANDSTILL_S = 4.0
"""A queue with something to do is taken for idle when its workers begin nothing for so long."""

CHUNK = 1000
PRUNE_CHUNKS = 60
TICKS_RETENTION = timedelta(days=1)
WORKERS_RETENTION_S = 86_400.0

_logger = log.get(__name__)


class Relay:
    """One relay; `run` until `stop`."""

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._instance = f"{settings().host}:{uuid4()}"
        self._stopping = threading.Event()
        self._due = threading.Event()
        self._steady_since: float | None = None
        self._was_away = False
        self._served_at = self._rescued_at = self._pruned_at = 0.0
        self._claims: dict[str, tuple[float, int]] = {}
        self._paces: dict[str, Pace] = {}
        self._helpers = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("courier", self._run_courier), ("listener", self._listen))
        ]

    def stop(self) -> None:
        """End `run` soon."""
        self._stopping.set()
        self._due.set()

    def run(self) -> None:
        """Pass after pass, until stopped; an unreachable PostgreSQL is waited for."""
        for helper in self._helpers:
            helper.start()
        pause_s = IDLE_PASS_S
        while not self._is_stopped_after(pause_s):
            try:
                pause_s = BUSY_PASS_S if self.round() else IDLE_PASS_S
            except DatabaseBusy as error:
                pause_s = IDLE_PASS_S
                _logger.warning("a pass did not come to its end", reason=str(error))
            except DatabaseUnavailable as error:
                self._was_away = True
                pause_s = IDLE_PASS_S
                _logger.warning("waiting for PostgreSQL", reason=str(error))
            except Exception:
                # One faulty row must not keep all others from being rung.
                pause_s = IDLE_PASS_S
                _logger.exception("the relay failed in one pass")
        self._retire()

    def _is_stopped_after(self, pause_s: float) -> bool:
        """Wait for the next pass, and less when something is due at once."""
        if self._due.wait(pause_s):
            self._stopping.wait(GATHER_S)
            self._due.clear()
        return self._stopping.is_set()

    def _listen(self) -> None:
        redis.listen(redis.DUE_CHANNEL, self._due.set, self._stopping)

    def _run_courier(self) -> None:
        """Deliver callbacks beside the passes: receivers may be slow."""
        courier = Courier()
        tried = 0
        while not self._stopping.wait(0 if tried else IDLE_PASS_S):
            try:
                tried = courier.round()
            except DatabaseUnavailable:
                tried = 0
            except Exception:
                tried = 0
                _logger.exception("the courier failed in one round")
        courier.close()

    def round(self) -> int:
        """Do one pass; return how many notices were rung."""
        now = time.monotonic()
        self._steady_since = self._steady_since or now
        # On connections that nobody else uses: the courier may be the first to find that PostgreSQL
        # was away, and then renews those that it shares.
        with self._transaction() as connection:
            if self._was_away:
                # A crash of PostgreSQL forgets claims: their notices are gone, their rows queued.
                connection.execute(statements.ring_again())
            connection.execute(statements.become_due(CHUNK))
            connection.execute(statements.wake_keys())
            agents = connection.execute(statements.busy_agents()).all()
        self._was_away = False
        if now - self._rescued_at >= RESCUE_EACH_S:
            self._rescued_at = now
            self._end_late()
            if self._steady_since and now - self._steady_since >= STEADY_S:
                self._rescue()
        self._notice_broker_loss()
        busy = {row.agent for row in agents}
        self._claims = {name: seen for name, seen in self._claims.items() if name in busy}
        rung = 0
        for agent in agents:
            notices = self._ring(agent)
            if notices is None:
                break  # a broker that does not answer is asked once a pass, not once an agent
            rung += notices
        if now - self._pruned_at >= PRUNE_EACH_S:
            self._pruned_at = now
            self._prune()
        if now - self._served_at >= HEARTBEAT_S:
            # After the pass: a relay that gets nowhere must not seem to live.
            self._served_at = now
            with self._transaction() as connection:
                connection.execute(statements.serve("relay", self._instance))
        return rung

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """Run statements in one transaction, and notice when PostgreSQL does not answer in time."""
        began = time.monotonic()
        answered = False
        try:
            with db.transaction() as connection:
                yield connection
            answered = time.monotonic() - began <= SLOW_S
        finally:
            if not answered:
                self._steady_since = None

    def _ring(self, agent: Row[tuple[str, int, int]]) -> int | None:
        """Fill one queue up to its window; None: the broker, whose depth decides, is away.

        What was rung in vain gets a quarter of the room at most, so that notices that still lie
        there do not keep out those that were never rung; nor may they keep out what is more urgent.
        """
        name = agent.agent
        levels = self._bell.levels(name)
        if levels is None:
            return None
        self._measure(agent)
        empty = [priority for priority in range(10) if not levels.get(priority)]
        out = sum(levels.values())
        room = max(0, self._paces[name].window - out)
        rows: list[Any] = []
        with self._transaction() as connection:
            if room:
                share = room if not out else -(-room // 4)
                rows += connection.execute(statements.ring_overdue(name, share, empty=empty))
                rows += connection.execute(statements.ring_unrung(name, room - len(rows)))
            elif urgent := above(levels):
                rows += connection.execute(statements.ring_unrung(name, 2 * agent.slots, urgent))
        is_behind = len(rows) >= room if room else self._paces[name].is_behind
        if is_behind != self._paces[name].is_behind:
            self._tell_pace(name, self._paces[name]._replace(is_behind=is_behind))
        # PostgreSQL does not promise the order of RETURNING; notices go out by priority, then age.
        notices = sorted((Notice(*row) for row in rows), key=lambda n: (-n.priority, n.task_id))
        self._bell.ring(notices, self._paces[name])
        return len(notices)

    def _measure(self, agent: Row[tuple[str, int, int]]) -> None:
        """Learn the pace of a queue while it has something to do.

        What was learnt holds while it has nothing to do: the next backlog is likely to be alike.
        Workers tell of their claims with each heartbeat, and quick ones more often.
        """
        now = time.monotonic()
        name = agent.agent
        if name not in self._paces:
            self._tell_pace(name, pace(0.0, agent.slots))
        then, claims = self._claims.setdefault(name, (now, agent.claims))
        passed_s = now - then
        if passed_s >= (PACE_S if agent.claims != claims else STANDSTILL_S):
            self._claims[name] = (now, agent.claims)
            drained_per_s = max(0, agent.claims - claims) / passed_s
            is_behind = self._paces[name].is_behind
            self._tell_pace(name, pace(drained_per_s, agent.slots, is_behind=is_behind))

    def _tell_pace(self, agent: str, found: Pace) -> None:
        """Keep a pace, and write it for the fronts: whatever stood there may be another relay's."""
        self._paces[agent] = found
        redis.attempt(lambda client: client.hset(PACES_KEY, agent, str(found)))

    def _notice_broker_loss(self) -> None:
        """Make rung rows due when the broker lost its queues; commit first, mark after."""
        life = self._bell.forgotten()
        if life is None:
            return
        with self._transaction() as connection:
            again = connection.execute(statements.ring_again()).rowcount
        self._bell.remember(life)
        if again:
            _logger.warning("the broker lost its queues; ringing again", rows=again)

    def _end_late(self) -> None:
        with self._transaction() as connection:
            ended = lifecycle.expire(connection)
        redis.announce_ended(ended)

    def _rescue(self) -> None:
        with self._transaction() as connection:
            rescued = lifecycle.rescue(connection, statements.lease_expired(CHUNK))
            # The notices that a dead worker held went with it.
            silent = {row.agent for row in connection.execute(statements.discharge_silent())}
            for agent in silent:
                connection.execute(statements.ring_again(agent))
        if silent:
            _logger.warning("a worker has died; ringing again", agents=sorted(silent))
        if rescued.tasks:
            redis.announce_ended(rescued.ended)
            _logger.warning("took back tasks of lost workers", rescued=rescued.tasks)

    def _prune(self) -> None:
        retention = {agent.name: agent.retention for agent in load().agents.values()}
        for old in (
            statements.prune(retention, otherwise=RETENTION, limit=CHUNK),
            statements.prune_ticks(after=TICKS_RETENTION, limit=CHUNK),
        ):
            for _ in range(PRUNE_CHUNKS):
                with self._transaction() as connection:
                    connection.execute(statements.prepare_prune())
                    if connection.execute(old).scalar_one() < CHUNK:
                        break
        with self._transaction() as connection:
            connection.execute(statements.prune_concurrency_keys(CHUNK))
            connection.execute(statements.prune_workers(WORKERS_RETENTION_S))
            connection.execute(statements.prune_services(WORKERS_RETENTION_S))

    def _retire(self) -> None:
        try:
            with self._transaction() as connection:
                connection.execute(statements.retire("relay", self._instance))
        except DatabaseUnavailable as error:
            _logger.warning("left without a goodbye", reason=str(error))
