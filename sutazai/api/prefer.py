"""The header `Prefer` (RFC 7240): how long a client will wait for its answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

DEFAULT_WAIT_S = 30

MAX_WAIT_S = 300


class Preference(NamedTuple):
    """How long to wait for the result, and what of the header was followed."""

    wait_s: int
    applied: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What the answer says about it."""
        return {"Preference-Applied": self.applied} if self.applied else {}


def read_preference(headers: Iterable[str]) -> Preference:
    """Read `wait=N` and `respond-async`; what cannot be parsed is ignored, as the RFC asks.

    Both together mean: wait so long, then answer without the result.
    """
    wait_s: int | None = None
    declined = False
    for part in ",".join(headers).split(","):
        name, _, value = part.partition(";")[0].partition("=")
        name, value = name.strip().lower(), value.strip().strip('"')
        if name == "respond-async" and not value:
            declined = True
        elif name == "wait" and wait_s is None and value.isascii() and value.isdecimal():
            wait_s = min(int(value[:9]), MAX_WAIT_S)
    applied = ["respond-async"] if declined else []
    applied += [f"wait={wait_s}"] if wait_s is not None else []
    default_s = 0 if declined else DEFAULT_WAIT_S
    return Preference(default_s if wait_s is None else wait_s, ", ".join(applied) or None)
