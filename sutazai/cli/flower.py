"""How Flower is started."""

from __future__ import annotations

import ipaddress
import os

from sutazai.errors import ConfigurationError
from sutazai.settings import settings

_AUTH = ("FLOWER_BASIC_AUTH", "FLOWER_AUTH", "FLOWER_AUTH_PROVIDER")


def arguments(port: int) -> list[str]:
    """Return Flower's options: open on loopback, with authentication beyond it."""
    bind = settings().bind
    options = [f"--address={bind}", f"--port={port}"]
    if _is_loopback(bind):
        # Flower closes its API unless it is told that open is meant.
        os.environ.setdefault("FLOWER_UNAUTHENTICATED_API", "true")
    elif not any(os.environ.get(name) for name in _AUTH):
        raise ConfigurationError(
            f"SUTAZAI_BIND: Flower would listen on {bind} for everybody; "
            "set FLOWER_BASIC_AUTH=user:password, or leave Flower out with --no-flower."
        )
    return options


def _is_loopback(bind: str) -> bool:
    try:
        return ipaddress.ip_address(bind).is_loopback
    except ValueError:
        return bind == "localhost"
