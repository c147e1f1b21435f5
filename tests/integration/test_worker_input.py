"""Whatever an action returns, raises or tells, its task ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from sutazai import admission, db, statements, worker
from sutazai.agent import Agent, Context, NoParams
from sutazai.errors import TaskFailed
from sutazai.keeper import Identity
from sutazai.reports import Reports
from sutazai.submission import Submission
from sutazai.testing import NoSystem
from tests.integration.test_worker import Silent

pytestmark = pytest.mark.usefixtures("database")

agent = Agent("tester", port=9999, doc="Tests.")


class Anything(BaseModel):
    value: Any = None


class Doing:
    """What the action is to do next."""

    act: Callable[[Context], Any] = staticmethod(lambda context: None)


@agent.action()
def act(params: NoParams, context: Context) -> Anything:
    """Do what the test asks for."""
    returned: Anything = Doing.act(context)
    return returned


def perform(act_of_it: Callable[[Context], Any]) -> Any:
    """Run a task whose action does this, and return its row."""
    Doing.act = staticmethod(act_of_it)
    submission = Submission(agent.get("act"), {})
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=True)
    identity = Identity("tester@here", "tester", "here")
    site = worker.Site(identity, Reports(), {"tester": agent}, NoSystem(), Silent())
    with suppress(TaskFailed):
        worker.perform(site, agent.get("act"), submission.task_id)
    with db.transaction() as connection:
        return connection.execute(statements.task(submission.task_id)).one()


TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # with NUL and surrogates
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.binary(max_size=20)
)
VALUE = st.recursive(
    SCALAR | st.sets(st.integers(), max_size=3) | st.builds(object),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SCALAR, inner, max_size=4),
    max_leaves=10,
)


def circle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@given(VALUE, st.booleans())
@settings(max_examples=100)
def test_any_result_is_stored_or_refused(value: Any, bare: bool) -> None:
    row = perform(lambda _: value if bare else Anything(value=value))
    assert row.state == "succeeded" or (row.state, row.error["code"]) == (
        "failed",
        "invalid_result",
    )


@pytest.mark.parametrize(
    "make",
    [
        circle,
        lambda: nested(101),
        lambda: nested(100_000),
        lambda: "x" * (1 << 20),
        lambda: 10**5000,
        lambda: float("nan"),
        lambda: "\ud800",
        lambda: "\x00",
    ],
)
def test_a_result_that_cannot_be_stored_is_invalid(make: Callable[[], Any]) -> None:
    row = perform(lambda _: Anything.model_construct(value=make()))
    assert (row.state, row.error["code"]) == ("failed", "invalid_result")


@given(TEXT)
@example("\ud800")  # as in the name of a file
@example("\x00")
@settings(max_examples=40)
def test_an_error_with_any_message_is_recorded(message: str) -> None:
    def fail(_: Context) -> None:
        raise ValueError(message)

    row = perform(fail)
    assert (row.state, row.error["code"]) == ("failed", "task_failed")


@example(float("nan"), "\ud800\x00", {"a": "\ud800", "b": float("inf")})
@given(st.floats(), TEXT, st.dictionaries(st.sampled_from(["a", "b"]), VALUE, max_size=2))
@settings(max_examples=60)
def test_whatever_is_told_on_the_way_the_task_ends(
    fraction: float, message: str, fields: dict[str, Any]
) -> None:
    def tell(context: Context) -> Anything:
        context.progress(fraction, message)
        context.log.info(message, **fields)
        return Anything()

    assert perform(tell).state in ("succeeded", "failed")
