"""Writes what was found: the tables of targets and peers, and a section a measurement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from benchmarks.machine import machine, packages
from benchmarks.measurement import (
    Bar,
    Finding,
    Measurement,
    Of,
    PeerLine,
    Row,
    Samples,
    Table,
    number,
)

NOTHING = "–"


@dataclass(frozen=True)
class Place:
    """What the measurements ran on, beside the machine and the packages."""

    servers: Sequence[str]
    sync_ms: float


def report(
    found: Mapping[str, Finding],
    faults: Mapping[str, str],
    known: Mapping[str, Measurement],
    rounds: int,
    place: Place,
) -> str:
    """Return benchmarks/results.md."""
    lines = [
        "# What it costs",
        "",
        f"`make bench` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {rounds} rounds: every figure is "
        "the median of its rounds, with the lowest and the highest. Within a round ours and the "
        "baseline are measured one after the other, so that a drift of the machine hits both. "
        "Absolute figures belong to this machine; ratios are what to compare.",
        "",
        f"Machine: {machine()}; its disk keeps a page of 8 KiB in {number(place.sync_ms)} ms.",
        "",
        f"Versions: {', '.join([*place.servers, *packages()])}.",
        "",
        "## Targets",
        "",
        *targets(found),
        *(f"\n{name} could not be measured: {why}" for name, why in faults.items()),
        "",
        "## Peers",
        "",
        "Trivial tasks on the same kind of servers, two worker processes, results kept. "
        "*survives*: whether accepted tasks outlive kill -9 of their worker, and the loss of "
        "Redis.",
        "",
        *peers([line for finding in found.values() for line in finding.peers]),
    ]
    for name, finding in found.items():
        lines += ["", *section(known[name], finding)]
    return "\n".join(lines) + "\n"


def targets(found: Mapping[str, Finding]) -> Iterator[str]:
    """Return the table of targets."""
    head = ("what", "ours", "baseline", "ratio", "first bar", "met", "then", "met")
    rows = [row for finding in found.values() for row in finding.rows]
    yield from _table(Table(head, [_cells(row) for row in rows]))


def _cells(row: Row) -> list[str]:
    target = row.target
    baseline = f"{row.baseline} {NOTHING} {target.against}" if row.baseline else target.against
    return [
        target.what,
        str(row.ours),
        baseline or NOTHING,
        NOTHING if row.ratio is None else f"{number(row.ratio)} ×",
        *_bar(row, target.first),
        *_bar(row, target.then),
    ]


def _bar(row: Row, bar: Bar | None) -> list[str]:
    if bar is None:
        return [NOTHING, NOTHING]
    text = bar.text(row.ours.unit)
    if bar.of is not Of.VALUE and row.baseline is None:
        return [text, "not measured"]
    return [text, "yes" if bar.is_met(row) else "**no**"]


def peers(lines: Sequence[PeerLine]) -> Iterator[str]:
    """Return the table of peers."""
    head = ("peer", "keeps results in", "submit", "drain", "round trip p50", "p99", "survives")
    yield from _table(Table(head, [_peer(line) for line in lines]))


def _peer(line: PeerLine) -> list[str]:
    figures = (line.submit, line.drain, line.trip_p50, line.trip_p99)
    cells = [_optional(samples) for samples in figures]
    if line.fault:
        cells[0] = line.fault
    return [line.name, line.keeps, *cells, line.survives]


def _optional(samples: Samples | None) -> str:
    return NOTHING if samples is None else str(samples)


def section(measured: Measurement, finding: Finding) -> Iterator[str]:
    """Return what one measurement has found, and how."""
    yield f"## {measured.name}"
    yield ""
    yield measured.how
    for note in finding.notes:
        yield ""
        yield note
    for table in finding.tables:
        yield ""
        yield from _table(table)
    for chart in finding.charts:
        yield ""
        yield f"![{chart.title}]({chart.name}.png)"


def _table(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(table.head)} |"
    yield f"|{'---|' * len(table.head)}"
    for row in table.rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
