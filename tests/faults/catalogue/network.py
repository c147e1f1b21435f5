"""Faults of the network between the system and its stores."""

from __future__ import annotations

import random

from tests.faults.fault import fault
from tests.faults.load import PROXIED_PAUSE_S
from tests.faults.network import missing_filters
from tests.faults.place import Kind, Place, last


@fault(
    "half-open connections to the broker",
    kind=Kind.PROXIED,
    is_long=True,
    pause_s=PROXIED_PAUSE_S,
    missing=missing_filters,
)
def lose_broker(place: Place, _: random.Random) -> None:
    _lose(place, "valkey")


@fault(
    "half-open connections to PostgreSQL",
    kind=Kind.PROXIED,
    is_long=True,
    pause_s=PROXIED_PAUSE_S,
    missing=missing_filters,
)
def lose_database(place: Place, _: random.Random) -> None:
    _lose(place, "postgresql")


def _lose(place: Place, store: str) -> None:
    """Let every connection fall silent for ever, and none be made for some seconds."""
    link = place.links[store]
    link.blackhole()
    try:
        last(3)
    finally:
        link.reconnect()


@fault("the network to both stores cut", kind=Kind.PROXIED)
def cut_network(place: Place, chance: random.Random) -> None:
    for link in place.links.values():
        link.cut()
    try:
        last(chance.uniform(3, 4))
    finally:
        for link in place.links.values():
            link.mend()
