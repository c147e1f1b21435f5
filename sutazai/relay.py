"""The relay: rings what is due, rescues what is lost, ends what is too late, prunes what is old.

Any number of relays may run: rows are taken with SKIP LOCKED, so a second one is harmless and the
first one's death costs nothing. It heals whatever the broker loses, because the rows are the truth.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

from sutazai import db, lifecycle, log, redis, statements
from sutazai.bell import WINDOWS_KEY, Bell, Notice, window
from sutazai.callbacks import Courier
from sutazai.errors import DatabaseBusy, DatabaseUnavailable
from sutazai.settings import settings

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

CHUNK = 1000
PRUNE_CHUNKS = 60
RETENTION_S = 30 * 86_400.0
SCHEDULED_RETENTION_S = 86_400.0
WORKERS_RETENTION_S = 86_400.0

_logger = log.get(__name__)


class Relay:
    """One relay; `run` until `stop`."""

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._instance = f"{settings().host}:{uuid4()}"
        self._stopping = threading.Event()
        self._steady_since: float | None = None
        self._was_away = False
        self._served_at = self._rescued_at = self._pruned_at = 0.0
        self._claims: dict[str, tuple[float, int]] = {}
        self._windows: dict[str, int] = {}
        self._courier = threading.Thread(target=self._run_courier, name="courier", daemon=True)

    def stop(self) -> None:
        """End `run` soon."""
        self._stopping.set()

    def run(self) -> None:
        """Pass after pass, until stopped; an unreachable PostgreSQL is waited for."""
        self._courier.start()
        pause_s = IDLE_PASS_S
        while not self._stopping.wait(pause_s):
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
        """Fill one queue up to its window; None: the broker, whose depth decides, is away."""
        depth = self._bell.depth(agent.agent)
        if depth is None:
            return None
        room = self._window(agent) - depth
        if room <= 0:
            return 0
        with self._transaction() as connection:
            overdue = statements.ring_overdue(agent.agent, room, queue_empty=depth == 0)
            rows = list(connection.execute(overdue))
            if len(rows) < room:
                rows += connection.execute(statements.ring_unrung(agent.agent, room - len(rows)))
        # PostgreSQL does not promise the order of RETURNING; notices go out by priority, then age.
        notices = sorted((Notice(*row) for row in rows), key=lambda n: (-n.priority, n.task_id))
        self._bell.ring(notices)
        return len(notices)

    def _window(self, agent: Row[tuple[str, int, int]]) -> int:
        now = time.monotonic()
        then, claims = self._claims.get(agent.agent, (now, agent.claims))
        drained_per_s = max(0, agent.claims - claims) / (now - then) if now > then else 0.0
        if agent.agent not in self._claims or now - then >= 2.0:
            self._claims[agent.agent] = (now, agent.claims)
            size = window(drained_per_s, agent.slots)
            if size != self._windows.get(agent.agent):
                self._windows[agent.agent] = size
                redis.attempt(lambda client: client.hset(WINDOWS_KEY, agent.agent, str(size)))
        return self._windows[agent.agent]

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
        for after_s, scheduled in ((RETENTION_S, False), (SCHEDULED_RETENTION_S, True)):
            old = statements.prune(after_s=after_s, scheduled=scheduled, limit=CHUNK)
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
