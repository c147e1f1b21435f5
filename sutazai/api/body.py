"""Reading what a client sends: a JSON object of bounded size; `Protocol` bounds its time."""

from __future__ import annotations

import asyncio
from email.message import Message
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from sutazai import payload
from sutazai.api.protocol import LATE
from sutazai.errors import InvalidInput, MalformedJSON, PayloadTooLarge, UnsupportedMediaType

MAX_BODY_BYTES = 1 << 20

M = TypeVar("M", bound=BaseModel)


async def read_object(request: Request) -> dict[str, Any]:
    """Return the JSON object of a request's body.

    Raises `UnsupportedMediaType`, `PayloadTooLarge`, `MalformedJSON` and `InvalidInput`.
    """
    body = await read_json(request)
    if not isinstance(body, dict):
        raise InvalidInput("The body must be a JSON object, as {…}.")
    return body


async def read_json(request: Request, most_bytes: int = MAX_BODY_BYTES) -> Any:
    """Return the JSON value of a request's body; raises as `read_object` does."""
    content_type = request.headers.get("content-type")
    if content_type is not None:
        _check_content_type(content_type)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("Send the body without Content-Encoding.")
    raw = await _read(request, most_bytes)
    if content_type is None:
        if not raw:
            raise MalformedJSON("The body is empty; send a JSON object.")
        raise UnsupportedMediaType("Send the header Content-Type: application/json.")
    if len(raw) > MAX_BODY_BYTES:
        return await asyncio.to_thread(payload.loads, raw)  # other clients must not wait for it
    return payload.loads(raw)


async def _read(request: Request, most_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > most_bytes:
        raise _too_large(most_bytes)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most_bytes:
            raise _too_large(most_bytes)
        chunks.append(chunk)
    if LATE in request.scope.get("extensions", ()):
        raise HTTPException(408, "The body did not arrive in time.", {"Connection": "close"})
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(most_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body is larger than {most_bytes} bytes.")


def _check_content_type(text: str) -> None:
    if text == "application/json":
        return
    message = Message()
    message["content-type"] = text
    kind = message.get_content_type()
    charset = str(message.get_param("charset", "utf-8")).lower()
    if not (kind == "application/json" or kind.endswith("+json")):
        raise UnsupportedMediaType(
            "The body is not declared as JSON; send Content-Type: application/json."
        )
    if charset not in ("utf-8", "utf8"):
        raise UnsupportedMediaType("The body must be UTF-8; leave the charset out or say utf-8.")


def parse_query(model: type[M], request: Request) -> M:
    """Validate the query of a request; raises `InvalidInput` that names every field at fault."""
    query = request.query_params
    many = {name for name, info in model.model_fields.items() if _is_list(info.annotation)}
    values = {name: query.getlist(name) if name in many else query[name] for name in query}
    payload.check(values)
    return payload.parse(model, values)


def _is_list(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is list
