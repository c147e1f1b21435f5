"""What attempts tell the worker's main process, through a pipe: they run in other processes."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import struct
import sys
import time
from enum import IntEnum
from typing import NamedTuple
from uuid import UUID


class Word(IntEnum):
    """What is told of an attempt."""

    CLAIMING = 0
    """It is about to be claimed: should the process die, its claim may be there or not."""

    TAKEN = 1
    """Claimed together with others, and waits for its turn."""

    BEGAN = 2
    """It runs."""

    DONE = 3
    """It has ended, and its outcome is to be recorded."""

    GONE = 4
    """The process has nothing more to do with it."""


_WORDS = tuple(Word)

_REPORT = struct.Struct("=B16s16sidd")
"""Word, task id, claim id, pid, limit in s, instant: far below PIPE_BUF, so writes are atomic.

The instant is of the monotonic clock, which all processes of a machine share.
"""

_PIPE_BYTES = 1 << 20
"""So much is written between two reads by children that run thousands of tasks a second."""


class Report(NamedTuple):
    """What an attempt tells of itself; its ids as they came, because most are only compared."""

    word: Word
    task: bytes
    claim: bytes
    pid: int
    limit_s: float
    at: float

    @property
    def task_id(self) -> UUID:
        """Whose attempt it is."""
        return UUID(bytes=self.task)

    @property
    def claim_id(self) -> UUID:
        """Which attempt it is."""
        return UUID(bytes=self.claim)


class Reports:
    """The pipe on which attempts report to the worker's main process."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        os.set_inheritable(self._writer, True)
        os.set_blocking(self.reader, False)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # more than this user may have
                fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def tell(self, word: Word, *claims: tuple[UUID, UUID], limit_s: float = math.inf) -> None:
        """Write one report for each (task, claim) pair, of which there are few."""
        pid, now = os.getpid(), time.monotonic()
        reports = [
            _REPORT.pack(word, task_id.bytes, claim_id.bytes, pid, limit_s, now)
            for task_id, claim_id in claims
        ]
        os.write(self._writer, b"".join(reports))

    def read(self) -> list[Report]:
        """Return the reports that have come."""
        try:
            raw = os.read(self.reader, _REPORT.size * (_PIPE_BYTES // _REPORT.size))
        except BlockingIOError:
            return []
        return [Report(_WORDS[word], *told) for word, *told in _REPORT.iter_unpack(raw)]
