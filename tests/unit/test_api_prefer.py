"""The header `Prefer`, and the parts of the API that need no service."""

from __future__ import annotations

import pytest

from sutazai.api.prefer import read_preference


@pytest.mark.parametrize(
    ("headers", "wait_s", "applied"),
    [
        ([], 30, None),
        (["wait=5"], 5, "wait=5"),
        (["WAIT = 5 ; x=1"], 5, "wait=5"),
        (['wait="7"'], 7, "wait=7"),
        (["wait=100000"], 300, "wait=300"),
        (["wait=99999999999999999999"], 300, "wait=300"),
        (["wait=0"], 0, "wait=0"),
        (["respond-async"], 0, "respond-async"),
        (["respond-async, wait=10"], 10, "respond-async, wait=10"),
        (["wait=10", "respond-async"], 10, "respond-async, wait=10"),
        (["wait=3, wait=9"], 3, "wait=3"),
        (["wait=-1"], 30, None),
        (["wait=soon, return=minimal"], 30, None),
        (["wait=1.5"], 30, None),
        (["wait=²"], 30, None),
        ([",;=,"], 30, None),
    ],
)
def test_preferences(headers: list[str], wait_s: int, applied: str | None) -> None:
    preference = read_preference(headers)
    assert preference.wait_s == wait_s
    assert preference.headers == ({"Preference-Applied": applied} if applied else {})
