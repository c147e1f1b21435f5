"""Fixtures of more than one file."""

from tests.integration.served import front, running

__all__ = ["front", "running"]
