"""Calls that are made unless they are called off."""

from __future__ import annotations

import gc
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from sutazai import alarm
from sutazai.alarm import Alarm

NEVER_S = 3600.0
SOON_S = 0.01


def nothing() -> None:
    """Do nothing."""


def wait_until_asleep(own: Alarm) -> None:
    """Wait until the thread of an alarm waits for what is planned."""
    deadline = time.monotonic() + 30
    while not time.monotonic() < own.sleeps_until < math.inf:
        assert time.monotonic() < deadline
    with own._lock:  # it lets go of it when it begins to wait
        pass


def makes_calls(own: Alarm) -> bool:
    """Whether an alarm makes a call that is planned now."""
    made = threading.Event()
    own.after(SOON_S, made.set)
    return made.wait(30)


def test_a_call_is_made_when_its_time_has_come() -> None:
    made = threading.Event()
    began = time.monotonic()
    Alarm().after(SOON_S, made.set)
    assert made.wait(30)
    assert time.monotonic() - began >= SOON_S


def test_an_earlier_call_is_not_kept_waiting_by_a_later_one() -> None:
    own = Alarm()
    own.after(NEVER_S, nothing)
    wait_until_asleep(own)
    assert makes_calls(own)


def test_a_call_that_was_called_off_is_not_made() -> None:
    own = Alarm()
    made: list[str] = []
    later = threading.Event()
    own.after(SOON_S, lambda: made.append("called off")).cancel()
    own.after(SOON_S, later.set)  # comes due after it
    assert later.wait(30)
    assert not made


def test_all_that_was_called_off_wakes_the_thread_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Alarm()
    waits: list[float] = []
    wait = own._changed.wait
    monkeypatch.setattr(own._changed, "wait", lambda left_s: (waits.append(left_s), wait(left_s)))
    last = threading.Event()
    for call in [own.after(i / 1000, nothing) for i in range(1000, 1100)]:
        call.cancel()
    own.after(1.1, last.set)
    assert last.wait(30)
    assert len(waits) <= 5


def test_a_call_that_takes_long_keeps_no_other_waiting() -> None:
    own = Alarm()
    let_go, made = threading.Event(), threading.Event()
    own.after(0, let_go.wait)
    own.after(SOON_S, made.set)
    try:
        assert made.wait(30)
    finally:
        let_go.set()


def test_a_thousand_calls_wait_on_one_thread() -> None:
    def threads() -> int:
        return sum(thread.name == "alarm" for thread in threading.enumerate())

    own = Alarm()
    before = threads()
    for _ in range(1000):
        own.after(NEVER_S, nothing)
    assert threads() == before + 1


def test_a_thread_that_cannot_be_started_costs_no_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Alarm()

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            own.after(NEVER_S, nothing)
    own.after(NEVER_S, nothing)
    wait_until_asleep(own)
    monkeypatch.setattr(alarm, "AGAIN_S", SOON_S)
    refused, made = threading.Event(), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (refused.set(), refuse(self)))
        own.after(0, made.set)
        assert refused.wait(30)
    assert made.wait(30)


class Interruption(Exception):
    """What a signal handler raises, as the time-out of an action's own may."""


@contextmanager
def interruptions() -> Iterator[None]:
    """Let a signal handler raise once for each time that the timer is set."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interruption

    before = signal.signal(signal.SIGVTALRM, interrupt)
    gc.disable()  # what is raised in a callback of the collector's ends there
    try:
        yield
    finally:
        gc.enable()
        signal.signal(signal.SIGVTALRM, before)


def plan_until_interrupted(own: Alarm) -> None:
    """Plan calls, and call them off, until a signal handler raises."""
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.001)
    while True:
        own.after(NEVER_S, nothing).cancel()


def test_a_signal_handler_that_raises_stops_no_alarm() -> None:
    own = Alarm()
    own.after(NEVER_S, nothing)
    with interruptions():
        for _ in range(50):
            with pytest.raises(Interruption):
                plan_until_interrupted(own)
    assert makes_calls(own)


def test_a_signal_handler_may_plan_a_call() -> None:
    own = Alarm()
    planned = threading.Event()

    def plan(number: int, frame: FrameType | None) -> None:
        own.after(NEVER_S, nothing).cancel()
        planned.set()

    before = signal.signal(signal.SIGVTALRM, plan)
    try:
        with own._lock:
            signal.raise_signal(signal.SIGVTALRM)
        assert planned.is_set()
    finally:
        signal.signal(signal.SIGVTALRM, before)


def test_a_forked_process_has_an_alarm_of_its_own() -> None:
    alarm.after(NEVER_S, nothing)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            alarm.after(SOON_S, lambda: os.write(writer, b"made"))
            threading.Event().wait(30)  # its parent ends it
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 4) == b"made"
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
