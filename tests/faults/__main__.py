"""The fault suite at length, as `make fault` runs it; it writes docs/faults.md."""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.faults.catalogue import FAULTS
from tests.faults.place import Place
from tests.faults.run import Run, run

REPORT = Path(__file__).parents[2] / "docs" / "faults.md"

_COLUMNS = ("fault", "times", "accepted", "lost", "doubled", "failed", "5xx", "recovery s")


def main(arguments: Sequence[str]) -> int:
    """Run the suite; return 1 when a promise was broken."""
    options = _parse(arguments)
    chosen = [
        fault
        for fault in FAULTS
        if options.only in fault.name and (options.runs > 1 or not fault.is_long)
    ]
    if not chosen:
        _say(f"No fault is named like {options.only!r}.")
        return 2
    chance = random.Random(options.seed)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="sutazai-fault-", dir="/tmp") as folder:
        place = Place.open(Path(folder) / ".sutazai")
        try:
            for fault in chosen:
                for _ in range(options.runs):
                    seed = options.seed if options.runs == 1 else chance.randrange(1_000_000)
                    each_s = options.seconds / 2
                    done = run(place, fault, seed, before_s=each_s, after_s=each_s)
                    runs.append(done)
                    sign = "ok " if done.verdict.is_good else "BAD"
                    _say(f"{sign} {fault.name}, seed {seed}: {done.verdict}")
                    for line in done.unexplained[:5]:
                        _say(f"    {line}")
        finally:
            place.close()
    if not options.only:
        REPORT.write_text(report(runs, options.seconds))
    return 0 if all(done.verdict.is_good for done in runs) else 1


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="times each fault is injected")
    parser.add_argument("--seconds", type=float, default=60.0, help="load around each, in seconds")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--only", default="", help="faults whose name contains this; no report")
    return parser.parse_args(arguments)


def report(runs: Sequence[Run], seconds: float) -> str:
    """Return docs/faults.md."""
    names = list(dict.fromkeys(done.fault.name for done in runs))
    rows = [_row(name, [done for done in runs if done.fault.name == name]) for name in names]
    total = sum(done.verdict.accepted for done in runs)
    notes: dict[str, float] = {}
    for done in runs:
        for note, value in done.notes.items():
            notes[note] = max(value, notes.get(note, 0.0))
    lines = [
        "# What was done to it, and what it lost",
        "",
        f"`make fault` on {datetime.now(UTC):%Y-%m-%d}: {len(runs)} injections into processes, "
        f"{seconds:g} s of load around each, {total} tasks accepted. Python "
        f"{platform.python_version()}, Celery {version('celery')}, {os.cpu_count()} cores, "
        "PostgreSQL and Valkey from the wheels.",
        "",
        "*lost*: accepted, and never ended. *doubled*: a key with two tasks, or an effect written "
        "with the outcome that is there more or less than once. *failed*: ended otherwise than by "
        "success though nothing was wrong with the task. *5xx*: answers without a task id that are "
        "not the documented 503. *recovery*: the longest time from the end of the fault until the "
        "last task that was accepted before it had ended.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
        *rows,
        "",
        *(f"* {note}: {value:.2f} s" for note, value in sorted(notes.items())),
        "",
    ]
    return "\n".join(lines)


def _row(name: str, runs: Sequence[Run]) -> str:
    verdicts = [done.verdict for done in runs]
    cells = [
        name,
        len(runs),
        sum(found.accepted for found in verdicts),
        sum(found.lost for found in verdicts),
        sum(found.doubled for found in verdicts),
        sum(found.failed for found in verdicts),
        sum(found.unexplained for found in verdicts),
        f"{max(found.recovery_s for found in verdicts):.1f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
