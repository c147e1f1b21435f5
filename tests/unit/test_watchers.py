"""What those who watch a worker are told of a message that names several tasks."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from celery.events.state import State as Watcher
from celery.utils.saferepr import saferepr

from sutazai import watchers
from sutazai.bell import HAND_HEADER, TOGETHER_MAX
from sutazai.hand import Told
from sutazai.models import new_id
from sutazai.state import State


class Dispatcher:
    """Hands events to what Flower keeps them in."""

    groups = ("task",)

    def __init__(self) -> None:
        self.watcher = Watcher()
        self._clock = 0

    def send(self, kind: str, **fields: Any) -> None:
        self._clock += 1
        more = {"hostname": "tester@here", "timestamp": self._clock, "clock": self._clock}
        more |= {"local_received": self._clock, "utcoffset": 0, "pid": 1}
        self.watcher.event({"type": kind, **more, **fields})


class Message(watchers.HandRequest):
    """A message as the worker's main process holds it."""

    def __init__(self, ids: list[UUID], eventer: Dispatcher) -> None:
        self.id = str(ids[0])
        self.name = "tester.work"
        self._eventer = eventer
        self._request_dict = {HAND_HEADER: [str(each) for each in ids[1:]]}


def test_a_watcher_sees_each_task_of_a_hand_as_it_went() -> None:
    ids = [new_id() for _ in range(5)]
    ends = [State.SUCCEEDED, State.FAILED, State.QUEUED, State.CANCELLED, State.SUCCEEDED]
    told = [Told(*each, 0.25, 'it\'s "said"') for each in zip(ids, ends, strict=True)]
    to = Dispatcher()
    message = Message(ids, to)
    to.send("task-received", uuid=message.id, name=message.name, args="", kwargs="", retries=0)
    message.send_event("task-started")
    seen = to.watcher.tasks
    assert {seen[str(each)].state for each in ids} == {"STARTED"}
    assert {seen[str(each)].name for each in ids} == {"tester.work"}
    said = saferepr(watchers.tell(told), 4096)  # as Celery hands a result over
    message.send_event("task-succeeded", result=said, runtime=1.0)
    states = [seen[str(each)].state for each in ids]
    assert states == ["SUCCESS", "FAILURE", "RETRY", "REVOKED", "SUCCESS"]
    assert seen[str(ids[4])].runtime == 0.25
    assert seen[str(ids[1])].exception == 'it\'s "said"'


def test_the_longest_hand_is_told_in_full() -> None:
    told = [Told(new_id(), State.SUCCEEDED, 12345.678901, "x" * 500) for _ in range(TOGETHER_MAX)]
    assert len(watchers._read(saferepr(watchers.tell(told), 4096))) == TOGETHER_MAX


def test_a_message_that_is_ended_by_force_is_told_of_all_its_tasks() -> None:
    ids = [new_id(), new_id()]
    to = Dispatcher()
    message = Message(ids, to)
    message.send_event("task-started")
    message.send_event("task-failed", exception="lost", traceback="")
    assert {to.watcher.tasks[str(each)].state for each in ids} == {"FAILURE"}


@pytest.mark.parametrize(
    "header", [None, "text", [], ["no id"], [1], [None], {}, [str(new_id())] * TOGETHER_MAX]
)
def test_a_header_that_we_did_not_write_names_no_further_tasks(header: Any) -> None:
    assert watchers.others_of({HAND_HEADER: header}) == []
