"""What long runs have shown of each fault, kept from one run to the next in record.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.faults.run import Run

RECORD = Path(__file__).with_name("record.json")

RUNS = 20
SECONDS = 60.0
"""Injections and seconds of load that an entry stands for, at least."""


@dataclass(frozen=True)
class Entry:
    """The latest long run of one fault."""

    fault: str
    on: str
    """The day, in UTC."""

    seed: int
    pause_s: float
    """Of the load: between two tasks of one client, on average."""

    injections: int
    load_s: float
    accepted: int
    lost: int
    doubled: int
    failed: int
    unexplained: int
    recovery_median_s: float
    recovery_longest_s: float
    notes: dict[str, float]
    """The longest time of what the fault itself has measured."""

    problems: list[str]
    """Why it is bad; empty when every promise was kept."""

    @classmethod
    def of(cls, run: Run) -> Entry:
        """Return what a run has shown; one without a verdict has accepted nothing."""
        found = run.verdict
        median_s, longest_s = run.recovery_s
        problems = [*run.errors, *run.unexplained[:3]]
        if not run.is_good and not problems:
            problems = [str(found)]
        return cls(
            fault=run.fault,
            on=f"{datetime.now(UTC):%Y-%m-%d}",
            seed=run.seed,
            pause_s=run.pause_s,
            injections=len(run.ended_at),
            load_s=round(run.load_s, 1),
            accepted=found.accepted if found else 0,
            lost=found.lost if found else 0,
            doubled=found.doubled if found else 0,
            failed=found.failed if found else 0,
            unexplained=found.unexplained if found else 0,
            recovery_median_s=round(median_s, 2),
            recovery_longest_s=round(longest_s, 2),
            notes={what: round(seconds, 2) for what, seconds in run.notes.items()},
            problems=problems,
        )


def recorded() -> dict[str, Entry]:
    """Return what is kept, by fault."""
    if not RECORD.exists():
        return {}
    return {entry["fault"]: Entry(**entry) for entry in json.loads(RECORD.read_text())}


def keep(run: Run) -> None:
    """Keep what a run has shown, in the place of what was kept of the same fault."""
    entries = {**recorded(), run.fault: Entry.of(run)}
    lines = [json.dumps(asdict(entries[fault]), ensure_ascii=False) for fault in sorted(entries)]
    RECORD.write_text("[\n" + ",\n".join(lines) + "\n]\n")
