"""Faults of disks."""

from __future__ import annotations

import random
import time
from pathlib import Path
from uuid import uuid4

import psycopg

from sutazai.embedded import Layout
from tests.faults import disk
from tests.faults.fault import fault
from tests.faults.place import Kind, Place, last, until

STOPS_WITHIN_S = 30.0
BACK_WITHIN_S = 60.0


@fault("a full disk under PostgreSQL", kind=Kind.CRAMPED, missing=disk.missing_mount)
def fill_data(place: Place, _: random.Random) -> None:
    _fill(place, Layout(place.system.home).home)


@fault("a full disk under the logs", kind=Kind.CRAMPED, missing=disk.missing_mount)
def fill_logs(place: Place, _: random.Random) -> None:
    with disk.filled(Layout(place.system.home).logs):
        place.post("work", str(uuid4()))
        last(3)  # each heartbeat and each task writes lines


@fault("a full disk under everything", kind=Kind.CRAMPED, missing=disk.missing_mount)
def fill_home(place: Place, _: random.Random) -> None:
    layout = Layout(place.system.home)
    _fill(place, layout.home, layout.logs)


def _fill(place: Place, *folders: Path) -> None:
    """Fill disks until nothing can be accepted any more, keep them full, and give the room back."""
    with disk.filled(*folders) as ballast:

        def refuses() -> bool:
            for each in ballast:
                each.fill()
            _use_up(place)
            answer = place.post("work", str(uuid4()))
            assert answer.status_code in (202, 503), answer.text
            return answer.status_code == 503

        until(refuses, STOPS_WITHIN_S, "nothing is accepted while the disk is full")
        last(2)
    freed_at = time.monotonic()
    until(lambda: _accepts(place), BACK_WITHIN_S, "tasks are accepted again")
    place.note("accepting again after a full disk was freed", time.monotonic() - freed_at)


def _use_up(place: Place) -> None:
    """Let PostgreSQL begin the next file of its log of changes, which takes room."""
    try:
        with place.connect(superuser=True) as connection:
            connection.execute("SELECT pg_logical_emit_message(false, 'fault', 'x')")
            connection.execute("SELECT pg_switch_wal()")
    except psycopg.OperationalError:
        pass  # it has stopped already


def _accepts(place: Place) -> bool:
    return place.post("work", str(uuid4())).status_code == 202
