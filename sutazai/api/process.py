"""`POST /process`: one action, named in a flat body, answered with its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from sutazai import errors, payload
from sutazai.api.acceptance import accept, answer_accepted, read_action, read_key, replayed
from sutazai.api.answer import error_answer, json_answer
from sutazai.api.body import parse_query, read_object
from sutazai.api.front import Front, front_of
from sutazai.api.prefer import Preference, read_preference
from sutazai.errors import DatabaseUnavailable
from sutazai.state import State
from sutazai.submission import DEFAULT_PRIORITY, NO_OPTIONS, Options, Submission

if TYPE_CHECKING:
    from sqlalchemy import Row


class ProcessQuery(BaseModel):
    """How the task is to be handled, beside the body, which is all the action's."""

    model_config = ConfigDict(extra="forbid")

    priority: int = Field(
        default=DEFAULT_PRIORITY, ge=0, le=9, description="0 to 9; 9 is the most urgent."
    )
    deadline_s: float | None = Field(
        default=None,
        gt=0,
        le=31_536_000,
        allow_inf_nan=False,
        description="Seconds after which the task, if it still is queued, fails.",
    )
    max_attempts: int | None = Field(
        default=None, ge=1, le=100, description="Failures allowed; default: the action's."
    )

    @property
    def options(self) -> Options:
        """The same as options of a task; the deadline is the database's to compute."""
        return Options(priority=self.priority, max_attempts=self.max_attempts)


_NO_QUERY = ProcessQuery()
"""What most requests ask for."""


async def process(request: Request) -> Response:
    """Perform an action and answer with its result, or with 202 when that takes too long."""
    front = front_of(request)
    submission = await _read(front, request)
    preference = read_preference(request.headers.getlist("prefer"))
    if not preference.wait_s:
        accepted = await accept(front, submission)
        return await answer_accepted(front, submission, accepted, headers=preference.headers)
    return await _wait(front, submission, preference)


async def _read(front: Front, request: Request) -> Submission:
    agent = front.agent
    query = parse_query(ProcessQuery, request) if request.scope["query_string"] else _NO_QUERY
    body = await read_object(request)
    key = read_key(request, body.pop("request_id", None), "request_id")
    if "action" not in body and agent.default_action:
        action = agent.get(agent.default_action)
    else:
        action = read_action(agent, body)
    params = {field: value for field, value in body.items() if field != "action"}
    options = NO_OPTIONS if query is _NO_QUERY else query.options
    if key is not None:
        known_options = options.model_dump(exclude_unset=True)
        values = {**known_options, "idempotency_key": key}
        options = payload.parse(Options, values, strict=True)
    return Submission(action, params, options, deadline_in_s=query.deadline_s)


async def _wait(front: Front, submission: Submission, preference: Preference) -> Response:
    waiting = front.waiting
    with waiting.watch(submission.task_id) as ended:
        accepted = await accept(front, submission)
        if accepted.fresh:
            await waiting.until(ended, preference.wait_s)
    if not accepted.fresh:
        with waiting.watch(accepted.task_id) as ended:
            if not await _has_ended(front, accepted.task_id):
                await waiting.until(ended, preference.wait_s)
    try:
        row = await front.outcomes.of(accepted.task_id)
    except DatabaseUnavailable:
        # It was accepted: an error without its id would make the client send it again.
        row = None
    headers = {**preference.headers, **replayed(accepted)}
    if row is None or not State(row.state).is_terminal:
        state = State.QUEUED if row is None else State(row.state)
        return await answer_accepted(front, submission, accepted, state, headers)
    return _outcome(row, headers)


async def _has_ended(front: Front, task_id: UUID) -> bool:
    try:
        row = await front.outcomes.of(task_id)
    except DatabaseUnavailable:
        return False
    return row is not None and State(row.state).is_terminal


def _outcome(row: Row[Any], headers: dict[str, str]) -> Response:
    task_id = str(row.task_id)
    if row.state == State.SUCCEEDED:
        head = {"status": "success", "task_id": task_id, "action": row.action}
        return json_answer({**head, **(row.result or {})}, headers=headers)
    failure = row.error or {}
    code = failure.get("code", errors.TaskFailed.code)
    return error_answer(
        errors.by_code(code).status,
        code,
        failure.get("message", "The task failed."),
        task_id=task_id,
        retryable=bool(failure.get("retryable", False)),
        headers=headers,
    )
