"""One load, one fault injected into it again and again, and one judgement of everything."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tests.faults.checker import Verdict, check
from tests.faults.fault import Fault
from tests.faults.load import Load
from tests.faults.place import AGENT, Place, until

WHOLE_WITHIN_S = 60.0
RECOVER_WITHIN_S = 180.0
"""Longer than what was accepted needs alone: meanwhile more comes in."""

LOOK_EACH_S = 0.5
"""Each look at what is open reads the whole table; when it ended is read from the rows."""

_OLD = "created_at < now() - interval '5 seconds'"
"""Else the backlogs of faults that last long would add up."""

AFTER_S = 0.5
"""So much longer than its last fault a load lasts at least."""


@dataclass
class Run:
    """What the injections of one fault into one load have shown."""

    fault: str
    seed: int
    pause_s: float
    load_s: float = 0.0
    ended_at: list[datetime] = field(default_factory=list)
    """When each fault was over."""

    recoveries_s: list[float] = field(default_factory=list)
    """Of each injection: from the end of the fault to the end of the last task accepted before."""

    verdict: Verdict | None = None
    """None when it came to no judgement."""

    errors: list[str] = field(default_factory=list)
    """What went wrong in the injections themselves."""

    unexplained: list[str] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Whether every promise was kept."""
        return not self.errors and self.verdict is not None and self.verdict.is_good

    @property
    def recovery_s(self) -> tuple[float, float]:
        """The median and the longest recovery."""
        found = self.recoveries_s or [0.0]
        return statistics.median(found), max(found)

    def __str__(self) -> str:
        """Say in one line how it went."""
        median_s, longest_s = self.recovery_s
        return (
            f"{'ok ' if self.is_good else 'BAD'} {self.fault}, seed {self.seed}: "
            f"{len(self.ended_at)} injections, {self.load_s:.0f} s of load, "
            f"recovery {median_s:.1f} s, at most {longest_s:.1f} s, "
            f"{self.verdict or 'no verdict'}" + "".join(f"; {error}" for error in self.errors)
        )


def run(
    place: Place,
    fault: Fault,
    seed: int,
    *,
    runs: int,
    seconds: float,
    tell: Callable[[str], None] = lambda _: None,
) -> Run:
    """Inject a fault at random moments of a load, each when the system is whole again, and judge.

    seed: of the moments and of all that is chosen at random. seconds: how long the load lasts at
    least; it lasts longer when the faults and their recoveries do, and ends before the last
    recovery is measured. tell: hears how it goes.
    """
    done = Run(fault.name, seed, fault.pause_s)
    place.notes.clear()
    chance = random.Random(seed)
    moments = sorted(chance.uniform(0, seconds) for _ in range(runs))
    try:
        until(place.is_whole, WHOLE_WITHIN_S, "the system is healthy before the fault")
        began_at, began = place.value("SELECT now()"), time.monotonic()
        with Load(place, seed, fault.pause_s) as load:
            try:
                for moment in moments:
                    if done.ended_at:
                        _note_recovery(place, done, tell)
                    _sleep_until(began + moment)
                    fault.inject(place, chance)
                    # The database's clock is this machine's too, but may not be asked just now.
                    done.ended_at.append(datetime.now(UTC))
                _sleep_until(max(began + seconds, time.monotonic() + AFTER_S))
            except Exception as error:
                done.errors.append(_line(error))
            done.load_s = time.monotonic() - began
        if len(done.recoveries_s) < len(done.ended_at):
            _note_recovery(place, done, tell)
        done.unexplained = load.log.unexplained
        done.verdict = check(place, load.log, began_at)
    except Exception as error:
        done.errors.append(_line(error))
    done.notes = dict(place.notes)
    return done


def _note_recovery(place: Place, done: Run, tell: Callable[[str], None]) -> None:
    """Wait until the system is whole after the last fault, and note how long that took."""
    ended_at = done.ended_at[-1]
    open_tasks = "SELECT count(*) FROM tasks WHERE created_at < %s AND finished_at IS NULL"
    until(
        lambda: place.value(open_tasks, ended_at) == 0,
        RECOVER_WITHIN_S,
        "all tasks accepted before the end of the fault have ended",
        LOOK_EACH_S,
    )
    backlog = f"SELECT count(*) FROM tasks WHERE {_OLD} AND finished_at IS NULL"
    worked_off = "what came meanwhile is worked off"
    until(lambda: place.value(backlog) == 0, RECOVER_WITHIN_S, worked_off, LOOK_EACH_S)
    until(place.is_whole, WHOLE_WITHIN_S, "the system is healthy after the fault")
    ticks = f"SELECT count(*) FROM tasks WHERE scheduled_by = '{AGENT}.tick' AND tick_at > %s"
    until(lambda: place.value(ticks, ended_at) > 0, WHOLE_WITHIN_S, "Beat ticks again")
    last = "SELECT max(finished_at) FROM tasks WHERE created_at < %s"
    finished_at: datetime | None = place.value(last, ended_at)
    recovery_s = max(0.0, (finished_at - ended_at).total_seconds()) if finished_at else 0.0
    done.recoveries_s.append(recovery_s)
    tell(f"    {done.fault}: {len(done.recoveries_s)}, recovered in {recovery_s:.1f} s")


def _sleep_until(instant: float) -> None:
    time.sleep(max(0.0, instant - time.monotonic()))


def _line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else repr(error)
