"""Parents and children that end at the same instant, or badly, on a real PostgreSQL."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from uuid import UUID

import pytest
from sqlalchemy import text, update

from sutazai import admission, db, lifecycle
from sutazai.errors import DatabaseUnavailable
from sutazai.models import tasks
from sutazai.state import Outcome, State
from sutazai.submission import Options, Submission
from tests.integration.test_lifecycle import accept, claim, expire_lease, finish, read, rescue, work

pytestmark = pytest.mark.usefixtures("database")

FAMILIES = 100


def _child(parent: UUID, call_index: int, **options: object) -> UUID:
    submission = Submission(work, {}, Options(**options), parent_id=parent, call_index=call_index)
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=False)
    return submission.task_id


def _wait(parent: UUID, claim_id: UUID, child: UUID) -> None:
    with db.transaction() as connection:
        assert lifecycle.delegate(connection, parent, claim_id, child)


def _end(child: UUID, claim_id: UUID, parent: UUID) -> None:
    with db.transaction() as connection:
        assert lifecycle.end(
            connection, child, claim_id, State.SUCCEEDED, Outcome.SUCCEEDED, parent_id=parent
        )


def _cancel(task_id: UUID) -> None:
    with db.transaction() as connection:
        lifecycle.cancel(connection, task_id)


def _at_once(pool: ThreadPoolExecutor, *calls: Callable[[], None]) -> None:
    """Make calls at the same instant, each on a thread and connection of its own."""
    start = Barrier(len(calls))

    def run(call: Callable[[], None]) -> None:
        start.wait(10)
        while True:
            try:
                return call()
            except DatabaseUnavailable:
                pass  # a deadlock, which PostgreSQL has ended: workers and clients try again

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
                partial(_end, first, first_claim, parent),
                partial(_end, second, second_claim, parent),
            )
    assert [read(parent).state for parent in parents] == ["succeeded"] * FAMILIES


def test_a_parent_that_is_cancelled_while_its_child_ends_is_left_by_neither() -> None:
    """Three generations, so that the end has to pass a waiting parent on to its own parent."""
    families = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
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
                partial(_end, child, child_claim, parent),
            )
            families.append([grandparent, parent, child])
    for family in families:
        states = {read(task_id).state for task_id in family}
        assert states == {"succeeded"}, states


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
    _end(first, first_claim, parent)
    assert read(parent).state == "succeeded"
