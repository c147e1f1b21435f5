"""`/schedules`: what runs by itself, and adding, changing, pausing, removing and running it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from sutazai import payload, schedule, statements
from sutazai.api import store
from sutazai.api.acceptance import accept, answer_accepted, read_key
from sutazai.api.answer import json_answer
from sutazai.api.body import parse_query, read_object
from sutazai.api.front import front_of
from sutazai.api.tasks import chosen_agent
from sutazai.schedule import NewSchedule, ScheduleChange

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection


class SchedulesQuery(BaseModel):
    """Which schedules to list."""

    model_config = ConfigDict(extra="forbid")

    agent: str | None = Field(default=None, description="Default: this front's; `*`: all.")


async def list_schedules(request: Request) -> Response:
    """List schedules by name."""
    query = parse_query(SchedulesQuery, request)
    agent = chosen_agent(front_of(request), query.agent)
    rows = await store.rows(statements.all_schedules(agent))
    return json_answer({"schedules": [schedule.to_json(row) for row in rows]})


async def add_schedule(request: Request) -> Response:
    """Add a schedule of this front's agent."""
    front = front_of(request)
    new = payload.parse(NewSchedule, await read_object(request), strict=True)

    async def work(connection: AsyncConnection) -> Row[Any]:
        return await connection.run_sync(schedule.add, new, front.agent)

    row = await store.run(work)
    return json_answer(schedule.to_json(row), 201, {"Location": f"/schedules/{row.name}"})


async def show_schedule(request: Request) -> Response:
    """Show a schedule of any agent."""
    return json_answer(schedule.to_json(await _find(request)))


async def change_schedule(request: Request) -> Response:
    """Change, pause or resume a schedule."""
    front, name = front_of(request), request.path_params["name"]
    wanted = payload.parse(ScheduleChange, await read_object(request), strict=True)

    async def work(connection: AsyncConnection) -> Row[Any]:
        return await connection.run_sync(schedule.change, name, wanted, front.agents)

    return json_answer(schedule.to_json(await store.run(work, again=True)))


async def remove_schedule(request: Request) -> Response:
    """Remove a schedule; its tasks stay."""
    name = request.path_params["name"]

    async def work(connection: AsyncConnection) -> None:
        await connection.run_sync(schedule.remove, name)

    await store.run(work)
    return Response(status_code=204)


async def run_schedule(request: Request) -> Response:
    """Make one task of a schedule now, beside its ticks."""
    front = front_of(request)
    row = await _find(request)
    key = read_key(request, None, "")
    submission = schedule.run_once(row, front.agents, source="api", idempotency_key=key)
    return await answer_accepted(front, submission, await accept(front, submission))


async def _find(request: Request) -> Row[Any]:
    name = request.path_params["name"]

    async def work(connection: AsyncConnection) -> Row[Any]:
        return await connection.run_sync(schedule.find, name)

    return await store.run(work, again=True)
