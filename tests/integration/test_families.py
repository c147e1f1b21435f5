"""Parents and children that end at the same instant, or badly, on a real PostgreSQL."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from threading import Barrier
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text, update

from sutazai import admission, db, lifecycle, statements
from sutazai.models import tasks
from sutazai.state import Outcome
from sutazai.submission import Options, Submission
from tests.integration.test_lifecycle import (
    accept,
    claim,
    delegate,
    expire_lease,
    finish,
    held,
    read,
    rescue,
    work,
)

pytestmark = pytest.mark.usefixtures("database")

FAMILIES = 300


def _child(parent: UUID, call_index: int, **options: object) -> UUID:
    submission = Submission(work, {}, Options(**options), parent_id=parent, call_index=call_index)
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=False)
    return submission.task_id


def _wait(parent: UUID, claim_id: UUID, child: UUID) -> None:
    assert delegate(parent, claim_id, child) is not None


def _end(child: UUID, claim_id: UUID) -> None:
    assert finish(child, claim_id)


def _cancel(task_id: UUID) -> None:
    with db.transaction() as connection:
        lifecycle.cancel(connection, task_id)


def _at_once(pool: ThreadPoolExecutor, *calls: Callable[[], Any]) -> None:
    """Make calls at the same instant, each on a thread and connection of its own.

    None of them may deadlock, which would raise.
    """
    start = Barrier(len(calls))

    def run(call: Callable[[], Any]) -> None:
        start.wait(10)
        call()

    for done in [pool.submit(run, call) for call in calls]:
        done.result()


def test_children_that_end_while_their_parent_begins_to_wait_wake_it() -> None:
    """A parent waits for one child; a second one that it made ends at the same instant."""
    parents = []
    with ThreadPoolExecutor(3) as pool:
        for _ in range(FAMILIES):
            parent = accept()
            parents.append(parent)
            parent_claim, _ = claim(parent)
            first, second = _child(parent, 1), _child(parent, 2)
            first_claim, second_claim = claim(first)[0], claim(second)[0]
            _at_once(
                pool,
                partial(_wait, parent, parent_claim, first),
                partial(_end, first, first_claim),
                partial(_end, second, second_claim),
            )
    assert [read(parent).state for parent in parents] == ["succeeded"] * FAMILIES


def test_cancelling_three_generations_while_the_last_one_ends_does_not_deadlock() -> None:
    families = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(30):
            grandparent = accept()
            grandparent_claim, _ = claim(grandparent)
            parent = _child(grandparent, 1)
            _wait(grandparent, grandparent_claim, parent)
            parent_claim, _ = claim(parent)
            child = _child(parent, 1)
            _wait(parent, parent_claim, child)
            child_claim, _ = claim(child)
            _at_once(
                pool,
                partial(_cancel, grandparent),
                partial(_end, child, child_claim),
            )
            families.append([grandparent, parent, child])
    for family in families:
        states = {read(task_id).state for task_id in family}
        assert states == {"succeeded"}, states


def test_cancelling_a_waiting_task_cancels_all_that_it_and_its_children_have_started() -> None:
    top = accept()
    top_claim, _ = claim(top)
    awaited, waiting, queued, ended = (_child(top, number) for number in range(1, 5))
    _wait(top, top_claim, awaited)
    running_claim, _ = claim(awaited)
    waiting_claim, _ = claim(waiting)
    deepest, aside = _child(waiting, 1), _child(waiting, 2)
    _wait(waiting, waiting_claim, deepest)
    assert finish(ended, claim(ended)[0])
    with db.transaction() as connection:
        gone = lifecycle.cancel(connection, top)
    assert {each.task_id for each in gone} == {waiting, queued, deepest, aside}
    assert {read(each.task_id).state for each in gone} == {"cancelled"}
    assert read(awaited).cancel_requested_at
    assert (read(top).state, read(ended).state) == ("waiting", "succeeded")
    held_back = held(awaited, running_claim)
    with db.transaction() as connection:
        lifecycle.requeue(connection, held_back, Outcome.RELEASED)
    assert (read(awaited).state, read(top).state) == ("cancelled", "cancelled")


def test_cancelling_a_family_whose_members_end_at_the_same_instant_does_not_deadlock() -> None:
    with ThreadPoolExecutor(5) as pool:
        for _ in range(30):
            top = accept()
            top_claim, _ = claim(top)
            parent, sibling = _child(top, 1), _child(top, 2)
            _wait(top, top_claim, parent)
            parent_claim, _ = claim(parent)
            child, cousin = _child(parent, 1), _child(parent, 2)
            _wait(parent, parent_claim, child)
            _at_once(
                pool,
                partial(_cancel, top),
                partial(_cancel, parent),
                *(partial(_end, each, claim(each)[0]) for each in (child, cousin, sibling)),
            )
            family = (top, parent, child, cousin, sibling)
            assert {read(each).state for each in family} == {"succeeded"}


def test_replacing_the_task_of_a_key_while_it_ends_does_not_deadlock() -> None:
    with ThreadPoolExecutor(2) as pool:
        for number in range(30):
            options = {"concurrency_key": f"k{number}", "on_conflict": "replace"}
            running = accept(**options)
            claim_id = uuid4()
            site = {"agent": "tester", "action": "work", "worker": "w", "host": "here"}
            limits = lifecycle.KeyLimits(1, None)
            with db.transaction() as connection:
                assert lifecycle.claim(
                    connection, running, limits, **site, claim_id=claim_id, worker_id=uuid4()
                )
            _at_once(pool, partial(accept, **options), partial(_end, running, claim_id))
            assert read(running).state == "succeeded"


@pytest.mark.parametrize("ending", ["poison", "cancelled", "deadline_exceeded"])
def test_a_child_that_ends_badly_wakes_its_parent(ending: str) -> None:
    parent = accept()
    parent_claim, _ = claim(parent)
    child = _child(parent, 1)
    _wait(parent, parent_claim, child)
    assert read(parent).state == "waiting"
    if ending == "poison":
        for _ in range(3):
            _change(child, run_at=text("now()"))
            assert claim(child)
            expire_lease(child)
            rescue()
    elif ending == "cancelled":
        _cancel(child)
    else:
        _change(child, deadline_at=text("now() - interval '1 second'"))
        with db.transaction() as connection:
            lifecycle.expire(connection)
    states = {read(task_id).state for task_id in (child, parent)}
    assert states == ({"cancelled"} if ending == "cancelled" else {"failed"})
    if ending != "cancelled":
        assert read(parent).error["code"] == ending


def test_nothing_of_a_tree_that_has_not_ended_is_pruned() -> None:
    """Whichever of its members goes on: above, below or beside those that have ended."""
    kept = []
    for going_on in range(4):
        top = accept()
        middle, aside = _child(top, 1), _child(top, 2)
        tree = [top, middle, aside, _child(middle, 1)]
        for number, task_id in enumerate(tree):
            if number != going_on:
                _change(task_id, state="succeeded", finished_at=text("now() - interval '2 days'"))
        kept += tree
    alone = accept()
    _change(alone, state="succeeded", finished_at=text("now() - interval '2 days'"))
    prune = statements.prune({}, otherwise=timedelta(days=1), limit=100)
    assert db.run(prune)[0].count == 1
    assert {row.task_id for row in db.run(select(tasks.c.task_id))} == set(kept)
    db.run(update(tasks).values(state="succeeded", finished_at=text("now() - interval '2 days'")))
    assert db.run(prune)[0].count == len(kept)


def _change(task_id: UUID, **values: object) -> None:
    with db.transaction() as connection:
        connection.execute(update(tasks).where(tasks.c.task_id == task_id).values(**values))


def test_a_parent_whose_second_child_goes_on_ends_with_the_one_it_waits_for() -> None:
    parent = accept()
    parent_claim, _ = claim(parent)
    first, second = _child(parent, 1), _child(parent, 2)
    _wait(parent, parent_claim, first)
    second_claim, _ = claim(second)
    assert finish(second, second_claim)
    assert read(parent).state == "waiting"
    first_claim, _ = claim(first)
    _end(first, first_claim)
    assert read(parent).state == "succeeded"
