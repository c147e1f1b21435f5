"""How many notices a worker holds in advance."""

from __future__ import annotations

from sutazai.prefetch import Appetite


class Worker:
    """A clock, and a count of notices that have been worked off."""

    def __init__(self, finished: int = 0) -> None:
        self.now = 100.0
        self.finished = finished
        self.appetite = Appetite(lambda: 2, lambda: self.finished, lambda: self.now)

    def after(self, seconds: float, finished: int) -> int:
        self.now += seconds
        self.finished += finished
        return self.appetite.most()


def test_it_begins_with_one_a_slot_also_after_a_reconnection() -> None:
    assert Worker().after(0, 0) == 2
    assert Worker(finished=5000).after(0, 0) == 2


def test_what_was_worked_off_lately_may_be_held_in_advance() -> None:
    worker = Worker()
    assert worker.after(0.1, 3) == 5
    assert worker.after(0.1, 3) == 8
    assert [worker.after(1.0, 100) for _ in range(5)][-1] >= 102


def test_long_tasks_are_not_hoarded() -> None:
    worker = Worker()
    # Each slot works off one in 10 s.
    assert max(worker.after(5.0, 1) for _ in range(20)) <= 3
    # Nor is what was held in quick times, once they are over.
    worker.after(0.5, 50)
    assert worker.after(3.0, 0) == 2


def test_a_pool_that_is_away_still_has_room_for_one() -> None:
    assert Appetite(lambda: 0, lambda: 0, lambda: 0.0).most() == 1
