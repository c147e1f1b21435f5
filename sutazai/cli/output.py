"""What commands print: tables for people, JSON alone on standard output for machines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PIPED_WIDTH = 200
"""Columns of a table that goes into a file or a pipe."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
errors = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else PIPED_WIDTH)

AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]

_COLOURS = {
    "healthy": "green",
    "degraded": "yellow",
    "unhealthy": "red",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "waiting": "cyan",
    "ok": "green",
    "warning": "yellow",
    "error": "red",
}


def fail(message: str, code: int, details: Sequence[Any] = ()) -> int:
    """Print one line on standard error, the details under it, and return the exit code."""
    errors.print(f"[red]sutazai:[/red] {escape(message)}", soft_wrap=True)
    for detail in details:
        parts = detail.values() if isinstance(detail, dict) else [detail]
        errors.print(f"  {escape(': '.join(map(str, parts)))}", soft_wrap=True)
    return code


def print_json(value: Any) -> None:
    """Print a value as JSON, and nothing else, on standard output."""
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str).decode() + "\n")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Return a table; words that name a state get its colour, numbers stand to the right."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    rows = [list(row) for row in rows]
    for index, column in enumerate(columns):
        numbers = rows and all(isinstance(row[index], int | float) for row in rows)
        made.add_column(
            column,
            justify="right" if numbers else "left",
            overflow="fold",
            no_wrap=index == 0,
        )
    for row in rows:
        made.add_row(*(cell(value) for value in row))
    return made


def cell(value: Any) -> str:
    """Return a value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    text = escape(str(value))
    colour = _COLOURS.get(text)
    return f"[{colour}]{text}[/{colour}]" if colour else text
