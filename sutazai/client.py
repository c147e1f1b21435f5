"""Clients of a front, for Python programs: `AgentClient`, and `AsyncAgentClient` for event loops.

    with AgentClient("http://127.0.0.1:8002") as client:
        answer = client.send_request("get_metrics")
        task_id = client.submit("get_metrics", priority=9)
        task = client.wait(task_id, timeout_s=60)

Errors are those of `sutazai.errors`, by the code of the answer. Requests are repeated with jitter
while the front does not answer. One that hands over a task carries an idempotency key, made anew
unless the caller gives one, so that repeating it never makes a second task.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote
from uuid import uuid4

import httpx
from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from sutazai import payload
from sutazai.errors import QueueFull, SutazaiError, TaskFailed, Unavailable, by_code

ATTEMPTS = 4

TIMEOUT_S = 10.0
"""For an answer that waits for nothing; waits are added to it."""

WAIT_AT_MOST_S = 300.0
"""What a front admits in one request; longer waits are several."""

TERMINAL = ("succeeded", "failed", "cancelled")


class _Request(NamedTuple):
    method: str
    path: str
    body: Mapping[str, Any] | None = None
    wait_s: float = 0.0
    headers: Mapping[str, str] = {}

    def arguments(self, timeout_s: float) -> dict[str, Any]:
        """Return httpx's arguments."""
        content = None if self.body is None else payload.dumps(self.body)
        json_type = {} if self.body is None else {"Content-Type": "application/json"}
        return {
            "content": content,
            "headers": {**json_type, **self.headers},
            "timeout": httpx.Timeout(timeout_s, read=timeout_s + self.wait_s),
        }


class _Base:
    """What both clients share: requests, answers and when to repeat."""

    def __init__(self, base_url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s

    def _retrying(self) -> dict[str, Any]:
        return {
            "retry": retry_if_exception(lambda error: isinstance(error, (Unavailable, QueueFull))),
            "wait": wait_random_exponential(multiplier=0.1, max=2.0),
            "stop": stop_after_attempt(ATTEMPTS),
            "reraise": True,
        }

    def _unreachable(self, error: httpx.HTTPError) -> Unavailable:
        return Unavailable(f"{self.base_url} does not answer: {error or type(error).__name__}")

    @staticmethod
    def _perform(action: str, params: Mapping[str, Any], wait_s: float) -> _Request:
        whole_s = min(int(wait_s), int(WAIT_AT_MOST_S))
        headers = {"Prefer": f"wait={whole_s}"}
        if params.get("request_id") is None:  # which is the key's name in the body
            headers["Idempotency-Key"] = str(uuid4())
        return _Request("POST", "/process", {"action": action, **params}, whole_s, headers)

    @staticmethod
    def _submission(
        action: str, params: Mapping[str, Any] | None, options: Mapping[str, Any]
    ) -> _Request:
        chosen = {"idempotency_key": str(uuid4()), **options}
        body = {"action": action, "params": dict(params or {}), "options": chosen}
        return _Request("POST", "/tasks", body)

    @staticmethod
    def _watch(task_id: str, left_s: float) -> _Request:
        wait_s = min(max(left_s, 0.0), WAIT_AT_MOST_S)
        return _Request("GET", f"/tasks/{quote(task_id, safe='')}?wait={wait_s:.3f}", None, wait_s)


class _EventReader:
    """Reads a stream of Server-Sent Events, over as many connections as it takes."""

    SILENCE_S = 40.0
    """The front sends a comment every 15 s, so longer silence is a dead connection."""

    def __init__(self, task_id: str, timeout_s: float) -> None:
        self.path = f"/tasks/{quote(task_id, safe='')}/events"
        self.ended = False
        self._task_id = task_id
        self._timeout_s = timeout_s
        self._until = time.monotonic() + timeout_s
        self._last = ""
        self._failures = 0
        self._fields: dict[str, str] = {}

    def arguments(self) -> dict[str, Any]:
        """Return httpx's arguments of the next connection; raises TimeoutError."""
        self._check_time()
        self._fields = {}
        headers = {"Accept": "text/event-stream"}
        if self._last:
            headers["Last-Event-ID"] = self._last
        return {"headers": headers, "timeout": httpx.Timeout(TIMEOUT_S, read=self.SILENCE_S)}

    def begin(self, status: int) -> None:
        """Note that the front has answered; 204 says that nothing more comes."""
        self.ended = status == httpx.codes.NO_CONTENT

    def take(self, line: str) -> dict[str, Any] | None:
        """Take one line; return the event that it completes."""
        self._check_time()
        if line:
            name, _, value = line.partition(": ")
            self._fields[name] = value
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        self._failures = 0
        self._last = fields["id"]
        self.ended = fields["event"] == "result"
        data = payload.loads(fields["data"].encode())
        return {"id": int(fields["id"]), "event": fields["event"], "data": data}

    def pause_s(self, error: Exception) -> float:
        """Return how long to wait before the next connection; raises `Unavailable` at last."""
        self._failures += 1
        if self._failures >= ATTEMPTS:
            raise Unavailable(f"The events of {self._task_id} cannot be read: {error}") from error
        return random.uniform(0.1, 0.2 * 2**self._failures)  # noqa: S311 - only jitter

    def _check_time(self) -> None:
        if time.monotonic() > self._until:
            raise TimeoutError(f"{self._task_id} has not ended after {self._timeout_s:g} s.")


class AgentClient(_Base):
    """Talks to the front of one agent."""

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, timeout_s=timeout_s)
        self._http = httpx.Client(base_url=self.base_url, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send_request(self, action: str, /, **params: Any) -> dict[str, Any]:
        """Perform an action and return the front's answer: `status`, `task_id` and the result.

        A parameter `request_id` is the caller's idempotency key. Raises the error of a task that
        failed. When the task takes longer than 30 s the answer
        says `accepted`; `wait` goes on waiting for its `task_id`.
        """
        return self._send(self._perform(action, params, 30.0))

    def health_check(self) -> dict[str, Any]:
        """Return the agent's health; `status` is healthy, degraded or unhealthy."""
        return self._send(_Request("GET", "/health"))

    def submit(
        self, action: str, params: Mapping[str, Any] | None = None, /, **options: Any
    ) -> str:
        """Hand over a task and return its id at once. `options` are those of `POST /tasks`."""
        return str(self._send(self._submission(action, params, options))["task_id"])

    def wait(self, task_id: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Return the task as JSON once it has ended, however it did; raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            task = self._send(self._watch(task_id, left_s))
            if task["state"] in TERMINAL:
                return task
            if left_s <= 0:
                raise TimeoutError(f"{task_id} is still {task['state']} after {timeout_s:g} s.")

    def events(self, task_id: str, timeout_s: float = 3600.0) -> Iterator[dict[str, Any]]:
        """Yield what happens to a task as `{"id", "event", "data"}` until it has ended.

        A broken connection is made again and goes on where it broke off. Raises TimeoutError.
        """
        reader = _EventReader(task_id, timeout_s)
        while not reader.ended:
            try:
                with self._http.stream("GET", reader.path, **reader.arguments()) as answer:
                    if not answer.is_success:
                        answer.read()
                        _content(answer)
                    reader.begin(answer.status_code)
                    for line in answer.iter_lines():
                        if (event := reader.take(line)) is not None:
                            yield event
            except (httpx.HTTPError, Unavailable) as error:
                time.sleep(reader.pause_s(error))

    def _send(self, request: _Request) -> dict[str, Any]:
        return Retrying(**self._retrying())(self._send_once, request)

    def _send_once(self, request: _Request) -> dict[str, Any]:
        try:
            answer = self._http.request(
                request.method, request.path, **request.arguments(self._timeout_s)
            )
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        return _content(answer)


class AsyncAgentClient(_Base):
    """Talks to the front of one agent from an event loop; see `AgentClient`."""

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, timeout_s=timeout_s)
        self._http = httpx.AsyncClient(base_url=self.base_url, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send_request(self, action: str, /, **params: Any) -> dict[str, Any]:
        """Perform an action; see `AgentClient.send_request`."""
        return await self._send(self._perform(action, params, 30.0))

    async def health_check(self) -> dict[str, Any]:
        """Return the agent's health; see `AgentClient.health_check`."""
        return await self._send(_Request("GET", "/health"))

    async def submit(
        self, action: str, params: Mapping[str, Any] | None = None, /, **options: Any
    ) -> str:
        """Hand over a task and return its id; see `AgentClient.submit`."""
        return str((await self._send(self._submission(action, params, options)))["task_id"])

    async def wait(self, task_id: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Return the task once it has ended; see `AgentClient.wait`."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            task = await self._send(self._watch(task_id, left_s))
            if task["state"] in TERMINAL:
                return task
            if left_s <= 0:
                raise TimeoutError(f"{task_id} is still {task['state']} after {timeout_s:g} s.")

    async def events(
        self, task_id: str, timeout_s: float = 3600.0
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield what happens to a task; see `AgentClient.events`."""
        reader = _EventReader(task_id, timeout_s)
        while not reader.ended:
            try:
                async with self._http.stream("GET", reader.path, **reader.arguments()) as answer:
                    if not answer.is_success:
                        await answer.aread()
                        _content(answer)
                    reader.begin(answer.status_code)
                    async for line in answer.aiter_lines():
                        if (event := reader.take(line)) is not None:
                            yield event
            except (httpx.HTTPError, Unavailable) as error:
                await asyncio.sleep(reader.pause_s(error))

    async def _send(self, request: _Request) -> dict[str, Any]:
        return await AsyncRetrying(**self._retrying())(self._send_once, request)

    async def _send_once(self, request: _Request) -> dict[str, Any]:
        try:
            answer = await self._http.request(
                request.method, request.path, **request.arguments(self._timeout_s)
            )
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        return _content(answer)


def _content(answer: httpx.Response) -> dict[str, Any]:
    """Return an answer's JSON object; raises the error that it tells of."""
    try:
        content = payload.loads(answer.content)
    except SutazaiError:
        content = None
    if not isinstance(content, dict):
        raise Unavailable(
            f"{answer.request.url} answered {answer.status_code} without a JSON object; "
            "is it an agent's front?"
        )
    if content.get("status") == "error":
        task_id = content.get("task_id")
        kind = by_code(str(content.get("code")), TaskFailed if task_id else SutazaiError)
        message = str(content.get("message", ""))
        raise kind(
            f"{message} (task {task_id})" if task_id else message,
            details=content.get("details") or [],
        )
    return content
