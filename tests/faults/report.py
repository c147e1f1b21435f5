"""The report of what long runs have shown: docs/faults.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.faults.load import CLIENTS
from tests.faults.record import Entry

_COLUMNS = (
    "fault",
    "on",
    "injections",
    "seconds of load",
    "every",
    "accepted",
    "lost",
    "doubled",
    "failed",
    "5xx",
    "recovery s, median",
    "recovery s, longest",
)


def report(entries: Mapping[str, Entry], catalogue: Sequence[str], place: str) -> str:
    """Return the report.

    catalogue: the names of all faults, in order. place: on what it was written.
    """
    rows = [entries[name] for name in catalogue if name in entries]
    missing = [name for name in catalogue if name not in entries]
    bad = [row for row in rows if row.problems]
    injections = sum(row.injections for row in rows)
    accepted = sum(row.accepted for row in rows)
    lines = [
        "# What was done to it, and what it lost",
        "",
        f"{injections} injections of {len(rows)} faults into running systems of real processes by "
        f"`make fault`, {accepted} tasks accepted; "
        f"{f'{len(bad)} of the faults broke a promise' if bad else 'every promise was kept'}. Each "
        f"fault stands with the day of its latest run. {place}",
        "",
        "Each fault has one load, into which it is injected at random moments, each time when the "
        f"system is whole again. The load is {CLIENTS} clients that each hand over a task every so "
        "often (*every*, on average), under a key, and repeat it until it is accepted; a third of "
        "the tasks delegates to a child; a schedule ticks every second. What was accepted is "
        "checked when the load is over.",
        "",
        "*lost*: accepted, and never ended. *doubled*: a key or a tick with two tasks, a tick "
        "before its time, or an effect written with the outcome that is there more or less than "
        "once. *failed*: ended otherwise than by success though nothing was wrong with the task. "
        "*5xx*: answers without a task id that are not the documented 503. *recovery*: of each "
        "injection, from the end of the fault until the last task that was accepted before it had "
        "ended; after a fault of a minute that includes the work of that minute.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
        *map(_row, rows),
        "",
    ]
    notes: dict[str, float] = {}
    for row in rows:
        for note, value in row.notes.items():
            notes[note] = max(value, notes.get(note, 0.0))
    lines += [f"* {note}: at most {value:.2f} s" for note, value in sorted(notes.items())]
    if missing:
        lines += [f"* Not injected at this length yet: {'; '.join(missing)}."]
    for row in bad:
        lines += [f"* **{row.fault}**, seed {row.seed}: {'; '.join(row.problems)}"]
    return "\n".join(lines).rstrip() + "\n"


def _row(row: Entry) -> str:
    cells = (
        f"**{row.fault}: bad**" if row.problems else row.fault,
        row.on,
        row.injections,
        f"{row.load_s:.0f}",
        f"{row.pause_s:g} s",
        row.accepted,
        row.lost,
        row.doubled,
        row.failed,
        row.unexplained,
        f"{row.recovery_median_s:.1f}",
        f"{row.recovery_longest_s:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"
