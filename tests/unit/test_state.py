"""The state machine: every pair of states is either an allowed move or a refused one."""

import itertools
from pathlib import Path

import pytest

from sutazai.state import MOVES, TERMINAL, State

ALLOWED = {
    ("queued", "running"),
    ("queued", "failed"),
    ("queued", "cancelled"),
    ("running", "queued"),
    ("running", "waiting"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
    ("waiting", "succeeded"),
    ("waiting", "failed"),
    ("waiting", "cancelled"),
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_every_pair(before: State, after: State) -> None:
    assert (after in MOVES[before]) == ((before.value, after.value) in ALLOWED)


def test_terminal_states_are_those_without_a_way_out() -> None:
    assert set(TERMINAL) == {"succeeded", "failed", "cancelled"}
    assert not State.RUNNING.is_terminal


def test_the_chart_in_the_docs_draws_the_same_moves() -> None:
    chart = (Path(__file__).parents[2] / "docs" / "lifecycle.md").read_text()
    drawn = {
        (before.strip(), after.partition(":")[0].strip())
        for line in chart.splitlines()
        if "-->" in line
        for before, _, after in [line.partition("-->")]
    }
    assert {pair for pair in drawn if "[*]" not in pair} == ALLOWED
