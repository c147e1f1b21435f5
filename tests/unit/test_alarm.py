"""Calls that are made unless they are called off."""

from __future__ import annotations

import os
import threading
import time

from sutazai import alarm
from sutazai.alarm import Alarm

NEVER_S = 3600.0
SOON_S = 0.01


def test_a_call_is_made_when_its_time_has_come() -> None:
    made = threading.Event()
    began = time.monotonic()
    Alarm().after(SOON_S, made.set)
    assert made.wait(30)
    assert time.monotonic() - began >= SOON_S


def test_an_earlier_call_is_not_kept_waiting_by_a_later_one() -> None:
    own = Alarm()
    own.after(NEVER_S, threading.Event().set)
    made = threading.Event()
    own.after(SOON_S, made.set)
    assert made.wait(30)


def test_a_call_that_was_called_off_is_not_made() -> None:
    own = Alarm()
    made: list[str] = []
    later = threading.Event()
    own.after(SOON_S, lambda: made.append("called off")).cancel()
    own.after(SOON_S, later.set)  # comes due after it
    assert later.wait(30)
    assert not made


def test_a_call_that_takes_long_keeps_no_other_waiting() -> None:
    own = Alarm()
    let_go, made = threading.Event(), threading.Event()
    own.after(0, lambda: let_go.wait(30))
    own.after(SOON_S, made.set)
    assert made.wait(30)
    let_go.set()


def test_a_thousand_calls_wait_on_one_thread() -> None:
    own = Alarm()
    before = threading.active_count()
    calls = [own.after(NEVER_S, threading.Event().set) for _ in range(1000)]
    assert threading.active_count() == before + 1
    for call in calls:
        call.cancel()


def test_a_forked_process_has_an_alarm_of_its_own() -> None:
    alarm.after(NEVER_S, threading.Event().set)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        alarm.after(SOON_S, lambda: os.write(writer, b"made"))
        threading.Event().wait(30)  # its parent ends it
        os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 4) == b"made"
    finally:
        os.close(reader)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
