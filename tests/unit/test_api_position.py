"""The estimate of a place in the queue, without a queue."""

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from sutazai.api import store
from sutazai.api.position import Positions
from sutazai.errors import DatabaseUnavailable


def estimates(positions: Positions, number: int) -> list[int | None]:
    async def ask() -> list[int | None]:
        asked = (positions.estimate(uuid4(), "a", 5) for _ in range(number))
        return await asyncio.gather(*asked)

    return asyncio.run(ask())


def test_postgresql_is_asked_once_a_second_also_when_it_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    async def away(*_: Any, within_s: float) -> Any:
        asked.append(within_s)
        raise DatabaseUnavailable

    monkeypatch.setattr(store, "rows", away)
    assert estimates(Positions(), 20) == [None] * 20
    assert len(asked) == 1
    assert asked[0] < 0.5


def test_those_that_came_since_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    async def rows(*_: Any, **__: Any) -> Any:
        return [(9_998,)]

    monkeypatch.setattr(store, "rows", rows)
    assert estimates(Positions(), 5) == [9_998, 9_999, 10_000, None, None]
