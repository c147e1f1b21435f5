"""One file a measurement; importing this package registers all of them, in their order."""

from benchmarks.measurements import (  # noqa: I001 - in the order in which they are made
    accept,
    bulk,
    drain,
    trip,
    waiters,
    idle,
    start,
    scrape,
    flower,
    scale,
)

__all__ = [
    "accept",
    "bulk",
    "drain",
    "flower",
    "idle",
    "scale",
    "scrape",
    "start",
    "trip",
    "waiters",
]
