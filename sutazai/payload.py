"""JSON as this system takes it: what is malformed, what is refused, and nothing rounded silently.

`loads` reads bytes from outside; `check` examines values that are already Python objects
(arguments of `celery call`, results of actions); `parse` makes them the fields of a model.
PostgreSQL's jsonb refuses some of what JSON allows (NUL in a string), and JSON parsers disagree on
the rest (large integers, NaN, depth), so `loads` and `check` hold one rule here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from sutazai.errors import InvalidInput, MalformedJSON

MAX_DEPTH = 100
MAX_RESULT_BYTES = 1 << 20
INTEGER_RANGE = (-(1 << 63), (1 << 64) - 1)
"""Integers outside the signed and unsigned 64-bit ranges are refused, never rounded."""

# orjson turns an integer beyond 64 bits into a float. Only a text with 19 digits in a row can
# hold one, so everything else takes the fast path.
_LONG_INTEGER = re.compile(rb"[0-9]{19}")

M = TypeVar("M", bound=BaseModel)


def loads(raw: bytes) -> Any:
    """Parse JSON text; with duplicate keys the last wins.

    Raises `MalformedJSON` (empty, byte order mark, truncated, NaN, Infinity, a number beyond a
    double, a lone surrogate, deeper than 100) and `InvalidInput` (NUL in a string, an integer
    beyond 64 bits).
    """
    if not raw.strip():
        raise MalformedJSON("The body is empty; send a JSON object.")
    if _LONG_INTEGER.search(raw):
        _refuse_long_integers(raw)
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise MalformedJSON(f"The body is not valid JSON: {error}.") from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise MalformedJSON(f"The body is nested deeper than {MAX_DEPTH} levels.")
    if b"\\u0000" in raw:
        check(value)
    return value


def dumps(value: Any) -> str:
    """Write JSON text for PostgreSQL or Redis; the value has passed `check` or a model."""
    return orjson.dumps(value, default=str).decode()


def dumps_sorted(value: Any) -> bytes:
    """Write JSON in one form, whatever the order of keys, to be hashed."""
    return orjson.dumps(value, default=str, option=orjson.OPT_SORT_KEYS)


def check_plain(value: Any) -> int:
    """Do what `check` does for a value made of plain JSON types; return its size in bytes.

    One pass in compiled code finds what cannot be wrong, which is nearly every value.
    """
    raw = to_json(value, inf_nan_mode="constants")
    if (
        any(token in raw for token in (b"NaN", b"Infinity", b"\\u0000"))
        or _LONG_INTEGER.search(raw)
        or raw.count(b"[") + raw.count(b"{") > MAX_DEPTH
    ):
        check(value)
    return len(raw)


def check_finite(value: Any) -> None:
    """Raise `InvalidInput` when a value of any types holds NaN or an infinity."""
    raw = to_json(value, inf_nan_mode="constants", bytes_mode="base64", serialize_unknown=True)
    if b"NaN" not in raw and b"Infinity" not in raw:
        return
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, float) and item - item != 0:
            raise InvalidInput(f"{item} is not a JSON number.")
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            stack.extend(item)


def check(value: Any) -> None:  # noqa: PLR0912 - one branch a type
    """Raise `InvalidInput` when a Python value cannot be stored as JSON without loss."""
    stack: list[tuple[Any, int]] = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH + 1:
            raise InvalidInput(f"The value is nested deeper than {MAX_DEPTH} levels.")
        match item:
            case None | bool():
                pass
            case str():
                _check_text(item)
            case int():
                if not INTEGER_RANGE[0] <= item <= INTEGER_RANGE[1]:
                    raise InvalidInput(
                        "An integer is beyond 64 bits; send it as a string to keep all digits."
                    )
            case float():
                if item - item != 0:
                    raise InvalidInput(f"{item} is not a JSON number.")
            case dict():
                for key in item:
                    if not isinstance(key, str):
                        raise InvalidInput(f"The key {key!r} is not a string.")
                    _check_text(key)
                stack.extend((child, depth + 1) for child in item.values())
            case list() | tuple():
                stack.extend((child, depth + 1) for child in item)
            case _:
                raise InvalidInput(f"A value of type {type(item).__name__} is not JSON.")


def parse(
    model: type[M], values: Mapping[str, Any], *, strict: bool = False, prefix: str = ""
) -> M:
    """Make values the fields of a model; others than those are refused.

    strict: the types are those of JSON, where the text "1" is no number. Raises `InvalidInput` that
    names every field at fault, below the prefix.
    """
    try:
        if strict:
            return model.model_validate_json(dumps(values), strict=True, extra="forbid")
        return model.model_validate(values, extra="forbid")
    except ValidationError as error:
        raise _refuse(error, prefix) from None


def _refuse(error: ValidationError, prefix: str) -> InvalidInput:
    details = [
        {
            "field": ".".join([prefix] * bool(prefix) + [str(part) for part in fault["loc"]]),
            "message": fault["msg"],
        }
        for fault in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    first, *others = details
    text = f"{first['field']}: {first['message']}" if first["field"] else first["message"]
    more = f" (and {len(others)} more)" if others else ""
    return InvalidInput(text + more, details=details)


def _check_text(text: str) -> None:
    if "\x00" in text:
        raise InvalidInput("A string contains NUL (\\u0000), which cannot be stored.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidInput("A string contains a lone surrogate.") from None


def _refuse_long_integers(raw: bytes) -> None:
    """Raise `InvalidInput` for an integer beyond 64 bits; what is malformed is not our business."""
    beyond: list[str] = []

    def note(digits: str) -> int:
        if len(digits) > 20 or not INTEGER_RANGE[0] <= int(digits) <= INTEGER_RANGE[1]:
            beyond.append(digits[:40])
        return 0

    try:
        json.loads(raw, parse_int=note, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return
    if beyond:
        raise InvalidInput(
            "An integer is beyond 64 bits; send it as a string to keep all digits.",
            details=beyond,
        )


def _not_json(constant: str) -> None:
    raise ValueError(constant)


def _depth(value: Any) -> int:
    deepest = 0
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, (dict, list)):
            deepest = max(deepest, depth)
            children = item.values() if isinstance(item, dict) else item
            stack.extend((child, depth + 1) for child in children)
    return deepest
