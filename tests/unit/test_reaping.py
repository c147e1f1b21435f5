"""The end of a pool's process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sutazai.reaping import LAST_LOOK_S, Reaping


class Pool:
    """What the step sees of Celery's pool, with one process."""

    def __init__(self) -> None:
        self.process = SimpleNamespace(exitcode=None)
        self._pool = [self.process]

    def _event_process_exit(self, _: Any, process: Any) -> None:
        assert process is self.process
        self.maintain_pool()

    def maintain_pool(self) -> None:
        if self.process.exitcode is not None:
            self._pool.clear()


class Hub:
    """An event loop whose time passes when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, Any]] = []

    def call_later(self, pause_s: float, function: Any, *arguments: Any) -> None:
        self.waiting.append((pause_s, lambda: function(*arguments)))

    def turn(self) -> float:
        pause_s, call = self.waiting.pop(0)
        call()
        return pause_s


@pytest.fixture
def pool() -> Pool:
    made = Pool()
    Reaping(SimpleNamespace()).start(SimpleNamespace(pool=SimpleNamespace(_pool=made)))
    return made


def test_a_process_that_has_ended_is_replaced_at_once(pool: Pool) -> None:
    hub = Hub()
    pool.process.exitcode = -9
    pool._event_process_exit(hub, pool.process)
    assert not pool._pool
    assert not hub.waiting


def test_one_that_is_about_to_end_is_looked_at_again(pool: Pool) -> None:
    hub = Hub()
    pool._event_process_exit(hub, pool.process)
    hub.turn()
    assert pool._pool
    pool.process.exitcode = -9
    hub.turn()
    assert not pool._pool
    assert not hub.waiting


def test_one_that_does_not_end_is_left_to_celerys_own_round(pool: Pool) -> None:
    hub, waited_s = Hub(), 0.0
    pool._event_process_exit(hub, pool.process)
    while hub.waiting:
        waited_s += hub.turn()
    assert LAST_LOOK_S / 2 < waited_s < 2 * LAST_LOOK_S


def test_other_pools_are_left_alone() -> None:
    Reaping(SimpleNamespace()).start(SimpleNamespace(pool=SimpleNamespace()))
