"""What a measurement is: its name, its targets, and the typed finding that it returns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path


@dataclass(frozen=True)
class Samples:
    """One figure, measured once a round."""

    values: Sequence[float]
    unit: str

    @property
    def median(self) -> float:
        """The figure that counts."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        spread = f" ({number(low)} – {number(high)})" if len(self.values) > 1 else ""
        return f"{number(self.median)} {self.unit}{spread}"


def number(value: float) -> str:
    """Write a number with three digits that mean something, or all of a large one."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


class Of(Enum):
    """What of a figure a bar is held against."""

    VALUE = "the figure itself"
    RATIO = "how many times the baseline it is"
    DIFFERENCE = "by how much it exceeds the baseline"


@dataclass(frozen=True)
class Bar:
    """A bound that a figure is to reach."""

    bound: float
    at_least: bool
    of: Of

    def is_met(self, row: Row) -> bool:
        """Whether the median reaches it."""
        found = row.ours.median
        if self.of is not Of.VALUE:
            if row.baseline is None:
                return False
            base = row.baseline.median
            found = found / base if self.of is Of.RATIO else found - base
        return found >= self.bound if self.at_least else found <= self.bound

    def text(self, unit: str) -> str:
        """Write it, with its sign and unit."""
        sign = "≥" if self.at_least else "≤"
        match self.of:
            case Of.VALUE:
                return f"{sign} {number(self.bound)} {unit}"
            case Of.RATIO:
                return f"{sign} {number(self.bound)} ×"
            case Of.DIFFERENCE:
                return f"{sign} baseline + {number(self.bound)} {unit}"


def at_least(bound: float, of: Of = Of.VALUE) -> Bar:
    """Return a bar for what should be high."""
    return Bar(bound, at_least=True, of=of)


def at_most(bound: float, of: Of = Of.VALUE) -> Bar:
    """Return a bar for what should be low."""
    return Bar(bound, at_least=False, of=of)


@dataclass(frozen=True)
class Target:
    """One line of the table of targets, before it is measured."""

    what: str
    first: Bar | None
    then: Bar | None
    against: str = ""
    """The name of the baseline."""

    def row(self, ours: Samples, baseline: Samples | None = None) -> Row:
        """Return the line, measured."""
        return Row(self, ours, baseline)


@dataclass(frozen=True)
class Row:
    """One line of the table of targets."""

    target: Target
    ours: Samples
    baseline: Samples | None = None

    @property
    def ratio(self) -> float | None:
        """How many times the baseline it is."""
        return self.ours.median / self.baseline.median if self.baseline else None


@dataclass(frozen=True)
class PeerLine:
    """One line of the table of peers; a figure that was not measured is None."""

    name: str
    keeps: str
    survives: str
    submit: Samples | None = None
    drain: Samples | None = None
    trip_p50: Samples | None = None
    trip_p99: Samples | None = None
    fault: str = ""
    """Why it was not measured."""


@dataclass(frozen=True)
class Curve:
    """Points of one line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """One plot; `name` is its file's, without the ending."""

    name: str
    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = True
    log_y: bool = False


@dataclass(frozen=True)
class Table:
    """Details as a table."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Finding:
    """All that a measurement has found."""

    rows: Sequence[Row]
    peers: Sequence[PeerLine] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    charts: Sequence[Chart] = ()


@dataclass(frozen=True)
class Run:
    """How to measure: how often, how much, and where."""

    rounds: int
    is_quick: bool
    folder: Path
    """For homes and data; removed in the end."""

    say: Callable[[str], None]

    def size(self, full: int, quick: int) -> int:
        """Return how many to measure with."""
        return quick if self.is_quick else full

    def seconds(self, full: float) -> float:
        """Return how long to measure."""
        return min(full, 1.5) if self.is_quick else full


Measure = Callable[[Run], Finding]


@dataclass(frozen=True)
class Measurement:
    """A registered measurement."""

    name: str
    targets: Sequence[Target]
    measure: Measure

    @property
    def how(self) -> str:
        """How it is done, in words."""
        lines = (self.measure.__doc__ or "").strip().splitlines()
        return "\n".join(line.strip() for line in lines)


@dataclass
class _Registry:
    known: dict[str, Measurement] = field(default_factory=dict)


_registry = _Registry()


def measurement(name: str, *targets: Target) -> Callable[[Measure], Measure]:
    """Register a function that measures; its docstring says how, for the report."""

    def register(measure: Measure) -> Measure:
        if name in _registry.known:
            raise ValueError(f"There are two measurements named {name}.")
        _registry.known[name] = Measurement(name, targets, measure)
        return measure

    return register


def registered() -> dict[str, Measurement]:
    """Return the measurements by name, in the order in which they are made."""
    return dict(_registry.known)
