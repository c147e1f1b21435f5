"""The report of a long run: docs/faults.md."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from tests.faults.load import CLIENTS, PAUSE_S
from tests.faults.run import Run

_COLUMNS = (
    "fault",
    "injections",
    "seconds of load",
    "accepted",
    "lost",
    "doubled",
    "failed",
    "5xx",
    "recovery s, median",
    "recovery s, longest",
)


def report(
    runs: Sequence[Run], left_out: Mapping[str, str], *, arguments: str, seed: int, took_s: float
) -> str:
    """Return the report.

    left_out: faults that could not be injected, and why. arguments: those of the command.
    """
    injections = sum(len(done.ended_at) for done in runs)
    accepted = sum(done.verdict.accepted for done in runs if done.verdict)
    bad = [done for done in runs if not done.is_good]
    lines = [
        "# What was done to it, and what it lost",
        "",
        f'`make fault ARGS="{arguments}"` on {datetime.now(UTC):%Y-%m-%d}, seed {seed}: '
        f"{injections} injections of {len(runs)} faults into running systems of real processes, "
        f"{accepted} tasks accepted, {took_s / 60:.0f} minutes; "
        f"{f'{len(bad)} of the faults broke a promise' if bad else 'every promise was kept'}. "
        f"Python {platform.python_version()}, Celery {version('celery')}, {os.cpu_count()} cores, "
        "PostgreSQL and Valkey from the wheels.",
        "",
        "Each fault has one load, into which it is injected at random moments, each time when the "
        f"system is whole again. The load is {CLIENTS} clients that each hand over a task about "
        f"every {PAUSE_S:g} s, under a key, and repeat it until it is accepted; a third "
        "of the tasks delegates to a child; a schedule ticks every second. What was accepted is "
        "checked when the load is over.",
        "",
        "*lost*: accepted, and never ended. *doubled*: a key or a tick with two tasks, a tick "
        "before its time, or an effect written with the outcome that is there more or less than "
        "once. *failed*: ended otherwise than by success though nothing was wrong with the task. "
        "*5xx*: answers without a task id that are not the documented 503. *recovery*: of each "
        "injection, from the end of the fault until the last task that was accepted before it had "
        "ended.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
        *map(_row, runs),
        "",
    ]
    notes: dict[str, float] = {}
    for done in runs:
        for note, value in done.notes.items():
            notes[note] = max(value, notes.get(note, 0.0))
    lines += [f"* {note}: at most {value:.2f} s" for note, value in sorted(notes.items())]
    lines += [f"* Not injected: {name}; missing: {why}" for name, why in left_out.items()]
    for done in bad:
        why = [*done.errors, *done.unexplained[:3]] or [str(done.verdict)]
        lines += [f"* **{done.fault}**, seed {done.seed}: {'; '.join(why)}"]
    return "\n".join(lines).rstrip() + "\n"


def _row(done: Run) -> str:
    found = done.verdict
    counts: list[object] = ["–"] * 5
    if found:
        counts = [found.accepted, found.lost, found.doubled, found.failed, found.unexplained]
    median_s, longest_s = done.recovery_s
    cells = [
        done.fault if done.is_good else f"**{done.fault}: bad**",
        len(done.ended_at),
        f"{done.load_s:.0f}",
        *counts,
        f"{median_s:.1f}",
        f"{longest_s:.1f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"
