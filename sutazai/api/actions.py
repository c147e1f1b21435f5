"""`GET /actions`: what the agent can do."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sutazai.agent import Action
from sutazai.api.answer import json_answer
from sutazai.api.front import front_of


async def list_actions(request: Request) -> Response:
    """List every action with the schemas of its parameters and result, and its limits."""
    agent = front_of(request).agent
    actions = [_describe(action) for action in agent.actions.values()]
    return json_answer({"agent": agent.name, "actions": actions})


def _describe(action: Action[Any, Any]) -> dict[str, Any]:
    return {
        "name": action.name,
        "description": action.doc,
        "params_schema": action.params_schema,
        "result_schema": action.result_schema,
        "time_limit_s": action.time_limit_s,
        "max_attempts": action.max_attempts,
        "rerun_after_crash": action.rerun_after_crash,
        "every_s": action.every.total_seconds() if action.every else None,
    }
