"""The faults, each a function that injects it into a system under load and lets it heal."""

from tests.faults.catalogue import broker, clock, database, hands, network, processes, storage
from tests.faults.fault import FAULTS, Fault

__all__ = [
    "FAULTS",
    "Fault",
    "broker",
    "clock",
    "database",
    "hands",
    "network",
    "processes",
    "storage",
]
