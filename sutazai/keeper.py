"""What keeps a worker honest: its heartbeat, the leases of what it runs, and their limits.

The `Keeper` is a thread of the worker's main process with a database connection of its own; it
never touches the broker, so it goes on while Celery blocks in one. Attempts report to it through a
pipe (`Reports`), because they run in other processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psutil

from sutazai import db, lifecycle, log, payload, redis, statements
from sutazai.agent import Agent
from sutazai.errors import DatabaseUnavailable, TaskCancelled, TaskFailed, TimeLimitExceeded
from sutazai.models import new_id
from sutazai.reports import Report, Reports, Word
from sutazai.settings import settings
from sutazai.state import Outcome, State

if TYPE_CHECKING:
    from sqlalchemy import Row


HEARTBEAT_S = 2.0

QUICK_CLAIMS = 100
"""So many claims are told before the next heartbeat: a relay learns from them how fast it goes."""

LIMIT_GRACE_S = 1.0
"""An attempt is ended this long after its limit, so that one that ends just in time still can."""

CANCEL_GRACE_S = 10.0
"""How long an action may ignore that it was cancelled before its process is ended."""

DRAIN_S = 25.0
"""How long running tasks may go on after the worker was asked to stop."""

DRAINED_S = 2.0
"""A worker that drains and runs nothing any more is given so long: Celery's pool may wait for what
never comes."""

TAKEN_S = 1.5
"""What a process has taken together with others is put back when its turn has not come by then."""

STUCK_S = 60.0
"""A worker with free slots that claims nothing for so long, though it could, restarts itself."""

STUCK_CHECK_S = 10.0

REGISTRY_S = 10.0

WATCH_S = 0.25
"""How often reports are read and limits are looked at while something runs."""

_logger = log.get(__name__)


# --- who this worker is ---------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """One worker process, told apart from its predecessors of the same name."""

    name: str
    agent: str
    host: str
    worker_id: UUID = field(default_factory=new_id)
    pid: int = field(default_factory=os.getpid)
    boot_id: str = field(default_factory=lambda: _read("/proc/sys/kernel/random/boot_id"))
    pid_namespace: str = field(default_factory=lambda: _link("/proc/self/ns/pid"))
    process_started_at: float = field(default_factory=lambda: psutil.Process().create_time())

    @property
    def row(self) -> dict[str, Any]:
        """The worker's row when it starts."""
        return {
            "worker_id": self.worker_id,
            "name": self.name,
            "agent": self.agent,
            "host": self.host,
            "pid": self.pid,
            "boot_id": self.boot_id,
            "pid_namespace": self.pid_namespace,
            "process_started_at": self.process_started_at,
        }

    def has_outlived(self, other: Row[Any]) -> bool:
        """Whether a worker recorded earlier is certainly gone; False when that cannot be known."""
        if not self.boot_id or self.boot_id != other.boot_id:
            return False
        if self.pid_namespace != other.pid_namespace:
            return False
        return not _is_alive(other.pid, other.process_started_at)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""


def _is_alive(pid: int, started_at: float | None = None) -> bool:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started_at is None or abs(process.create_time() - started_at) < 1.0
    except psutil.NoSuchProcess:
        return False


def _kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent dies, so that none is orphaned."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, number)


# --- the keeper -----------------------------------------------------------------------------


@dataclass
class Running:
    """An attempt that the keeper watches over."""

    last: Report
    cancel_seen_at: float | None = None
    missed: bool = False


class Keeper(threading.Thread):
    """Keeps the heartbeat and the leases of one worker, and ends what runs too long."""

    def __init__(
        self,
        identity: Identity,
        reports: Reports,
        agents: Mapping[str, Agent],
        *,
        slots: Callable[[], int],
        consuming: Callable[[], bool],
        broker_answers: Callable[[], bool],
        each_beat: Callable[[], None],
    ) -> None:
        super().__init__(name="keeper", daemon=True)
        self._identity = identity
        self._reports = reports
        self._agents = agents
        self._slots = slots
        self._consuming = consuming
        self._broker_answers = broker_answers
        self._each_beat = each_beat
        self._running: dict[bytes, Running] = {}
        """By their claims."""

        self._lost: deque[UUID] = deque()
        self._claims = 0
        self._stop_requested = threading.Event()
        self._wake_reader, self._wake_writer = os.pipe()
        self._drain_at: float | None = None
        self._told_at = 0.0
        self._end_at: float | None = None
        self._registered_at = 0.0
        self._claimed_at = self._stuck_checked_at = time.monotonic()

    def enlist(self) -> None:
        """Insert the worker's row, and take back at once what dead predecessors left running."""
        identity = self._identity
        with db.transaction() as connection:
            connection.execute(statements.enlist({**identity.row, "slots": self._slots()}))
            gone = [
                row.worker_id
                for row in connection.execute(
                    statements.predecessors(identity.name, identity.worker_id)
                )
                if identity.has_outlived(row)
            ]
            if gone:
                connection.execute(statements.discharge(gone))
                rescued = lifecycle.rescue(connection, statements.running_on(gone))
                connection.execute(statements.ring_again(identity.agent))
        if gone:
            redis.announce_ended(rescued.ended)
            redis.announce_due()
            _logger.warning("took over from a dead worker", rescued=rescued.tasks)

    def drain(self) -> None:
        """Bound the time that running tasks may take from now on."""
        self._told_at = time.monotonic()
        self._drain_at = self._told_at + DRAIN_S
        self._wake()

    def lost_notice(self, task_ids: Iterable[UUID]) -> None:
        """Ring tasks again whose process died: it may not have claimed them yet."""
        self._lost.extend(task_ids)
        self._wake()

    def give_up(self) -> None:
        """End the process at once: its main thread has failed. What it runs is put back."""
        self._end_at = time.monotonic()
        self._wake()

    def stop(self) -> None:
        """Record that the worker stops, and end the thread."""
        self._stop_requested.set()
        self._wake()
        self.join(timeout=5)
        identity = self._identity
        if not self.is_alive():
            # The pool has ended: what its processes had no time to put back is left to nobody else.
            with contextlib.suppress(DatabaseUnavailable):
                self._take_reports()
                self._take_back_crashed()
        with contextlib.suppress(DatabaseUnavailable), db.transaction() as connection:
            connection.execute(statements.discharge([identity.worker_id]))
        redis.attempt(lambda client: client.hdel("agents:registry", identity.agent))

    def _wake(self) -> None:
        os.write(self._wake_writer, b".")

    def run(self) -> None:
        """Watch until stopped; PostgreSQL being away only delays."""
        enlisted = False
        beat_at = extend_at = 0.0
        while not self._stop_requested.is_set():
            self._await(beat_at)
            self._take_reports()
            now = time.monotonic()
            try:
                if not enlisted:
                    self.enlist()
                    enlisted = True
                self._end_overruns(now)
                self._take_back_crashed()
                self._release_waiting(now)
                if now >= beat_at or self._claims >= QUICK_CLAIMS:
                    beat_at = now + HEARTBEAT_S
                    self._beat()
                    self._restart_if_stuck(now)
                if now >= extend_at and self._running:
                    extend_at = now + HEARTBEAT_S
                    self._extend(now)
                if self._drain_at and (now >= self._drain_at or self._is_drained(now)):
                    self._end_drain()
                if self._end_at and now >= self._end_at:
                    self._end_process()
                self._ring_lost()  # last: should a row be locked, nothing else waits for it
            except DatabaseUnavailable as error:
                _logger.warning("heartbeat delayed", reason=str(error))
                self._stop_requested.wait(1.0)
            except Exception:
                # The keeper must outlive whatever goes wrong in one round.
                _logger.exception("the keeper failed in one round")
                self._stop_requested.wait(1.0)

    def _await(self, beat_at: float) -> None:
        """Sleep until there is something to do.

        While nothing runs that is a report or the next heartbeat. Reports are not read one by one:
        to be woken twice a task would cost more than the task.
        """
        own = [self._wake_reader]
        woken: list[int] = []
        if not self._running:
            idle_s = max(0.0, beat_at - time.monotonic())
            if self._drain_at:
                idle_s = min(idle_s, WATCH_S)
            woken, _, _ = select.select([*own, self._reports.reader], [], [], idle_s)
        if self._running or self._reports.reader in woken:
            woken, _, _ = select.select(own, [], [], WATCH_S)
        if self._wake_reader in woken:
            os.read(self._wake_reader, 64)

    def _take_reports(self) -> None:
        for report in self._reports.read():
            self._told_at = report.at
            if report.word is Word.GONE:
                self._running.pop(report.claim, None)
                continue
            known = self._running.get(report.claim)
            if report.word is Word.BEGAN and (known is None or known.last.word < Word.BEGAN):
                self._claims += 1
                self._claimed_at = report.at
            if known is not None:
                known.last = report
            elif report.word is not Word.DONE:
                self._running[report.claim] = Running(report)

    def _beat(self) -> None:
        values: dict[str, Any] = {
            "running": self._count(Word.BEGAN),
            "slots": self._slots(),
            "consuming": self._consuming(),
        }
        claims, self._claims = self._claims, 0
        identity = self._identity
        if not db.run(statements.beat(identity.worker_id, **values, claims=claims)):
            db.run(statements.enlist({**identity.row, **values}))
        self._each_beat()
        if time.monotonic() - self._registered_at >= REGISTRY_S:
            self._registered_at = time.monotonic()
            self._register()

    def _register(self) -> None:
        agent = self._agents[self._identity.agent]
        entry = payload.dumps(
            {
                "agent": agent.name,
                "port": settings().port(agent.name, agent.port),
                "host": self._identity.host,
                "actions": sorted(agent.actions),
                "seen_at": datetime.now(UTC).isoformat(),
            }
        )
        redis.attempt(lambda client: client.hset("agents:registry", agent.name, entry))

    def _restart_if_stuck(self, now: float) -> None:
        """End a worker that is alive and does not consume, so that its supervisor starts another.

        It is told from one without work by due tasks that a relay has rung in vain, and from one
        whose broker is frozen by asking the broker.
        """
        if now - self._stuck_checked_at < STUCK_CHECK_S or self._end_at:
            return
        self._stuck_checked_at = now
        idle_s = now - self._claimed_at
        is_free = self._count(Word.BEGAN) < self._slots()
        if idle_s < STUCK_S or not self._consuming() or not is_free:
            return
        identity = self._identity
        claimable = statements.claimable(identity.agent, identity.host, identity.worker_id, STUCK_S)
        if not db.run(claimable)[0].found or not self._broker_answers():
            return
        _logger.error("the worker does not consume; it restarts", idle_s=round(idle_s, 1))
        drain_s = DRAIN_S if self._running else 0.0
        self._end_at = now + drain_s + CANCEL_GRACE_S  # should its main thread not hear it
        os.kill(os.getpid(), signal.SIGTERM)

    def _extend(self, now: float) -> None:
        # A claim that is under way may be there or not: nothing can be told from its absence.
        held = [r for r in self._running.values() if r.last.word is not Word.CLAIMING]
        if not held:
            return
        pairs = [(running.last.task_id, running.last.claim_id) for running in held]
        with db.transaction() as connection:
            kept = {row.claim_id: row for row in connection.execute(*statements.extend(pairs))}
        for running in held:
            row = kept.get(running.last.claim_id)
            if row is None and not running.missed:
                # It may just have ended, its report still under way: the next round decides.
                running.missed = True
            elif row is None and running.last.word is not Word.BEGAN:
                self._running.pop(running.last.claim)  # the process runs another task
            elif row is None:
                _logger.warning("aborting an attempt that lost its lease")
                self._kill(running)
            elif row.cancel_requested_at is not None and running.last.word is Word.BEGAN:
                running.cancel_seen_at = running.cancel_seen_at or now
                if now - running.cancel_seen_at > CANCEL_GRACE_S:
                    self._finish_by_force(running, TaskCancelled(), Outcome.CANCELLED)

    def _release_waiting(self, now: float) -> None:
        """Put back what was taken together with a task that runs unexpectedly long."""
        for running in list(self._running.values()):
            if running.last.word is Word.TAKEN and now - running.last.at > TAKEN_S:
                self._put_back(running, Outcome.RELEASED)

    def _put_back(self, running: Running, outcome: Outcome) -> None:
        ended: list[lifecycle.Ended] | None = None
        with db.transaction() as connection:
            row = connection.execute(statements.charge(running.last.task_id)).first()
            if row is not None:
                ended = lifecycle.requeue(connection, _held(row, running), outcome)
        self._running.pop(running.last.claim, None)
        redis.announce_ended(ended or [])

    def _count(self, word: Word) -> int:
        return sum(running.last.word is word for running in self._running.values())

    def _end_overruns(self, now: float) -> None:
        for running in list(self._running.values()):
            is_late = now - running.last.at > running.last.limit_s + LIMIT_GRACE_S
            if running.last.word is Word.BEGAN and is_late:
                error = TimeLimitExceeded(f"The task ran longer than {running.last.limit_s:g} s.")
                self._finish_by_force(running, error, Outcome.TIMED_OUT)

    def _take_back_crashed(self) -> None:
        own = os.getpid()
        dead = [
            r for r in self._running.values() if r.last.pid != own and not _is_alive(r.last.pid)
        ]
        for running in dead:
            self._take_reports()
            if running.last.claim not in self._running:
                continue
            if running.last.word is not Word.BEGAN:
                self._put_back(running, Outcome.LOST)  # it was not this task that ran
                continue
            with db.transaction() as connection:
                lost = statements.running_claim(running.last.task_id, running.last.claim_id)
                rescued = lifecycle.rescue(connection, lost, own_process=True)
            # Only now: while PostgreSQL is away it is tried again, so that it is never forgotten.
            self._running.pop(running.last.claim)
            redis.announce_ended(rescued.ended)
            _logger.warning(
                "the process of a task died",
                task_id=str(running.last.task_id),
                rescued=rescued.tasks,
            )
        if dead:
            redis.announce_due()

    def _ring_lost(self) -> None:
        if lost := list(self._lost):
            db.run(statements.ring_failed(lost, after_s=0.0))
            for _ in lost:
                self._lost.popleft()  # only now: while PostgreSQL is away it is tried again
            redis.announce_due()

    def _finish_by_force(self, running: Running, error: TaskFailed, outcome: Outcome) -> None:
        """End an attempt's process, then record why; one that was late may be tried again.

        While PostgreSQL is away this is done again each round, so that it is never taken for a
        crash.
        """
        if running.last.pid != os.getpid():
            _kill_process(running.last.pid)
        described = lifecycle.error_json(error)
        ended: list[lifecycle.Ended] | None = None
        with db.transaction() as connection:
            row = connection.execute(statements.charge(running.last.task_id)).first()
            if row is not None:
                held = _held(row, running)
                if outcome is Outcome.TIMED_OUT:
                    retries = self._agents[row.agent].get(row.action).retries(error)
                    ended = lifecycle.time_out(connection, held, row, described, retries=retries)
                else:
                    state = State.CANCELLED
                    ended = lifecycle.end(connection, held, state, outcome, error=described)
        self._running.pop(running.last.claim, None)
        if ended is not None:
            _logger.warning("ended a task by force", task_id=str(running.last.task_id), **described)
            redis.announce_ended(ended)
        if running.last.pid == os.getpid():
            self._end_process()

    def _kill(self, running: Running) -> None:
        self._running.pop(running.last.claim, None)
        if running.last.pid == os.getpid():
            self._end_process()
        _kill_process(running.last.pid)

    def _is_drained(self, now: float) -> bool:
        return not self._running and now - self._told_at > DRAINED_S

    def _end_drain(self) -> None:
        self._drain_at = None
        self._end_at = time.monotonic() + CANCEL_GRACE_S  # should a cold shutdown hang too
        if any(running.last.pid == os.getpid() for running in self._running.values()):
            self._end_process()
        # Celery's cold shutdown: it ends the children, whose attempts put their tasks back.
        os.kill(os.getpid(), signal.SIGQUIT)

    def _end_process(self) -> None:
        """Put back what runs here, on threads that cannot be ended singly too, and exit."""
        ended: list[lifecycle.Ended] = []
        with contextlib.suppress(DatabaseUnavailable), db.transaction() as connection:
            for running in self._running.values():
                row = connection.execute(statements.charge(running.last.task_id)).first()
                if row is not None:
                    held = _held(row, running)
                    ended += lifecycle.release(connection, held, again=row.rerun_after_crash) or ()
            connection.execute(statements.discharge([self._identity.worker_id]))
            # The notices that it holds go with it.
            connection.execute(statements.ring_again(self._identity.agent))
        redis.announce_ended(ended)
        _logger.warning("the worker ends itself; its supervisor starts another")
        os.kill(os.getpid(), signal.SIGKILL)


def _held(row: Any, running: Running) -> lifecycle.Claim:
    """Return the claim that an attempt was reported with, whoever may hold the task by now."""
    return lifecycle.Claim(
        row.task_id, running.last.claim_id, row.agent, row.parent_id, row.concurrency_key
    )
