"""A hand: several short tasks that one notice names, and one process takes together.

To hand a short task over costs more than to run it. So where a queue is drained quickly, a notice
names as many tasks as a slot drains in a moment (`bell.Pace`). They are claimed by one statement,
run one after the other, and their outcomes recorded by another one. Each is still a task of its
own: it has its claim, its limit and its place, and one that takes long lets go of those behind it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID, uuid4

from sutazai import alarm, db, lifecycle, log, redis, statements
from sutazai.agent import Action
from sutazai.errors import DatabaseUnavailable, LeaseLost, TaskCancelled, TaskFailed
from sutazai.reports import Word
from sutazai.state import Outcome, State
from sutazai.worker import (
    PATIENTLY,
    NotClaimed,
    Requeued,
    Site,
    Unrecorded,
    claimant_of,
    perform,
    run,
)

if TYPE_CHECKING:
    from sqlalchemy import Row

LATE_S = 0.5
"""What has waited for its turn so long is put back, for whoever is free; before the keeper does."""

GATHER_S = 0.05
"""How long an outcome waits at most for those that are recorded together with it."""

_logger = log.get(__name__)

_Taken = tuple[UUID, "Row[Any]"]


class Told(NamedTuple):
    """How a task of a hand went, for those who watch the worker."""

    task_id: UUID
    state: State
    ran_s: float
    text: str


def perform_all(site: Site, action: Action[Any, Any], task_ids: Sequence[UUID]) -> list[Told]:
    """Run the tasks that a notice has announced; those that cannot be taken so, one by one.

    Raises `NotClaimed` when there is nothing to do here.
    """
    if action.agent != site.identity.agent:
        raise NotClaimed  # a message that lay on the wrong queue
    claims = {task_id: uuid4() for task_id in task_ids}
    site.reports.tell(Word.CLAIMING, *claims.items())
    try:
        rows = _claim_all(site, action, claims)
    except Exception:
        site.reports.tell(Word.GONE, *claims.items())
        raise
    # As in `perform`, an exit amid the claims is told by nobody.
    site.reports.tell(Word.GONE, *(each for each in claims.items() if each[0] not in rows))
    taken = deque((claims[each], rows[each]) for each in claims if each in rows)
    told = _run_all(site, action, taken) if taken else []
    for task_id in claims:
        if task_id not in rows:
            with suppress(NotClaimed):
                told.append(_tell(task_id, perform, site, action, task_id))
    if not told:
        raise NotClaimed
    return told


def _run_all(site: Site, action: Action[Any, Any], taken: deque[_Taken]) -> list[Told]:
    taken_at = time.monotonic()
    endings = Endings(site)
    told: list[Told] = []
    site.reports.tell(Word.TAKEN, *((row.task_id, claim_id) for claim_id, row in taken))
    try:
        while taken:
            claim_id, row = taken[0]
            claim = (row.task_id, claim_id)
            try:
                site.reports.tell(Word.BEGAN, claim, limit_s=row.time_limit_s)
                taken.popleft()
                told.append(_tell(row.task_id, run, site, action, claim_id, row, endings))
            finally:
                if claim_id not in endings.given:
                    site.reports.tell(Word.GONE, claim)
            if time.monotonic() - taken_at > LATE_S:
                break
    finally:
        try:
            endings.flush()
        finally:
            endings.flush()  # what a drain has interrupted
            _put_back(site, taken)
    return told


def _tell(task_id: UUID, work: Callable[..., str], *arguments: Any) -> Told:
    """Do the work of one task, whose failure is no other one's."""
    began = time.monotonic()
    state, said = State.SUCCEEDED, ""
    try:
        said = work(*arguments)
    except TaskCancelled as error:
        state, said = State.CANCELLED, str(error)
    except TaskFailed as error:
        state, said = State.FAILED, str(error)
    except (Requeued, LeaseLost):
        state = State.QUEUED
    except (DatabaseUnavailable, Unrecorded) as error:
        # The row is still queued, or its lease runs out: the relay sees to it.
        state = State.QUEUED
        _logger.warning("PostgreSQL is away", reason=str(error))
    return Told(task_id, state, round(time.monotonic() - began, 6), said)


def _claim_all(
    site: Site, action: Action[Any, Any], claims: Mapping[UUID, UUID]
) -> dict[UUID, Row[Any]]:
    """Start attempts of several plain tasks, given with the ids of their claims; as `perform` does.

    Returns the rows of those that were claimed, by their ids.
    """
    claimant = claimant_of(site, action)
    rows: dict[UUID, Row[Any]] = {}
    for attempt in PATIENTLY:
        with attempt:
            found = [*db.run(statements.claim_many(claims, **claimant))]
            if attempt.retry_state.attempt_number > 1:
                found += db.run(statements.claimed(claims))
            rows = {row.task_id: row for row in found}
    return rows


def _put_back(site: Site, taken: deque[_Taken]) -> None:
    """Let go of what has not begun; charged to nobody."""
    if not taken:
        return
    agent = site.identity.agent
    try:
        for claim_id, row in taken:
            held = lifecycle.Claim(row.task_id, claim_id, agent, row.parent_id, None)
            with db.transaction() as connection:
                ended = lifecycle.requeue(connection, held, Outcome.RELEASED)
            redis.announce_ended(ended or [])
    except DatabaseUnavailable as error:
        _logger.warning("tasks are left to their leases", tasks=len(taken), reason=str(error))
    site.reports.tell(Word.GONE, *((row.task_id, claim_id) for claim_id, row in taken))


class Endings:
    """Outcomes of one process that are recorded together, each soon after it came."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._waiting: list[statements.Ending] = []
        self.given: set[UUID] = set()
        """The claims whose outcomes are recorded here, or have been."""

        self._adding = threading.Lock()
        self._recording = threading.Lock()
        self._late: alarm.Call | None = None

    def add(self, ending: statements.Ending) -> None:
        """Take an outcome that is to be recorded."""
        self._site.reports.tell(Word.DONE, (ending.task_id, ending.claim_id))
        self.given.add(ending.claim_id)
        with self._adding:
            self._waiting.append(ending)
            if self._late is None:
                self._late = alarm.after(GATHER_S, self.flush)

    def flush(self) -> None:
        """Record what has come; what PostgreSQL cannot take, or takes from another, is logged."""
        with self._recording:
            with self._adding:
                endings, self._waiting = self._waiting, []
                late, self._late = self._late, None
            if late is not None:
                late.cancel()
            if not endings:
                return
            recorded: Sequence[Any] = ()
            try:
                recorded = self._record(endings)
            except (DatabaseUnavailable, *db.REFUSALS) as error:
                # Their leases run out, and they are rescued.
                _logger.warning("outcomes are not recorded", tasks=len(endings), reason=str(error))
            except BaseException:
                # The worker drains: whoever holds this records them then.
                self._waiting = endings + self._waiting
                raise
            claims = [(ending.task_id, ending.claim_id) for ending in endings]
            self._site.reports.tell(Word.GONE, *claims)
            agent = self._site.identity.agent
            ended = [lifecycle.Ended(row.task_id, agent, row.state) for row in recorded]
            redis.announce_ended(ended)

    def _record(self, endings: Sequence[statements.Ending]) -> Sequence[Any]:
        """Record outcomes, and return the states of those that are."""
        try:
            recorded = self._finish(endings)
        except db.REFUSALS as error:
            if len(endings) == 1:
                return self._finish([_failed(endings[0], error)])
            # One is at fault, and the others must not pay for it.
            recorded = []
            for ending in endings:
                with suppress(*db.REFUSALS):
                    recorded += self._record([ending])
        if len(recorded) < len(endings):
            _logger.warning("outcomes refused: the attempts had lost their leases")
        return recorded

    def _finish(self, endings: Sequence[statements.Ending]) -> Sequence[Any]:
        recorded: Sequence[Any] = ()
        for attempt in PATIENTLY:
            with attempt:
                recorded = db.run(statements.finish_many(endings, time.monotonic()))
                if attempt.retry_state.attempt_number > 1:
                    # A commit that raises is uncertain: it may have happened.
                    recorded = db.run(statements.outcomes_of(endings))
        return recorded


def _failed(ending: statements.Ending, error: Exception) -> statements.Ending:
    """Return the ending of a task whose result PostgreSQL refuses."""
    described = lifecycle.error_json(error)
    failed = ending._replace(state=State.FAILED, outcome=Outcome.FAILED)
    return failed._replace(result=None, error=described)
