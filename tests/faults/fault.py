"""What a fault is, and the list of all that modules of the catalogue fill."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.load import PAUSE_S
from tests.faults.place import Kind, Place

Inject = Callable[[Place, random.Random], None]


def _nothing() -> str:
    return ""


@dataclass(frozen=True)
class Fault:
    """One way in which the world goes wrong."""

    name: str
    inject: Inject
    kind: Kind
    """The place that it needs."""

    is_long: bool = False
    """Only in the long form."""

    is_busy: bool = False
    """It takes all the cores: injected while nothing else is, which it would slow down."""

    pause_s: float = PAUSE_S
    """Of the load around it."""

    missing: Callable[[], str] = _nothing
    """Says what this machine lacks for it; empty when nothing."""


FAULTS: list[Fault] = []


def fault(
    name: str,
    *,
    kind: Kind = Kind.PLAIN,
    is_long: bool = False,
    is_busy: bool = False,
    pause_s: float = PAUSE_S,
    missing: Callable[[], str] = _nothing,
) -> Callable[[Inject], Inject]:
    """Add a function to the catalogue: it injects, lets heal, and raises when a promise broke."""

    def add(inject: Inject) -> Inject:
        FAULTS.append(Fault(name, inject, kind, is_long, is_busy, pause_s, missing))
        return inject

    return add
