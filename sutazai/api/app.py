"""The application of one agent's front."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sutazai.agent import Agent
from sutazai.api import (
    actions,
    batch,
    docs,
    events,
    monitoring,
    openapi,
    process,
    queue,
    retry,
    schedules,
    tasks,
)
from sutazai.api.front import Front
from sutazai.api.group import Group
from sutazai.api.health import Health
from sutazai.api.middleware import Entrance
from sutazai.api.outcomes import Outcomes
from sutazai.api.position import Positions
from sutazai.api.sample import SAMPLER, Sample
from sutazai.api.waiting import Waiting
from sutazai.bell import Bell
from sutazai.metrics import FrontMetrics

Endpoint = Callable[[Request], Awaitable[Response]]

ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "/process", process.process),
    ("POST", "/tasks", tasks.create_task),
    ("GET", "/tasks", tasks.list_tasks),
    # Before /tasks/{task_id}, which would take them for ids.
    ("POST", "/tasks/batch", batch.create_tasks),
    ("POST", "/tasks/retry", retry.retry_tasks),
    ("GET", "/tasks/{task_id}", tasks.show_task),
    ("GET", "/tasks/{task_id}/events", events.stream_events),
    ("POST", "/tasks/{task_id}/cancel", tasks.cancel_task),
    ("POST", "/tasks/{task_id}/retry", retry.retry_task),
    ("GET", "/queue", queue.show_queue),
    ("POST", "/queue/pause", queue.pause_queue),
    ("POST", "/queue/resume", queue.resume_queue),
    ("POST", "/queue/drain", queue.drain_queue),
    ("GET", "/schedules", schedules.list_schedules),
    ("POST", "/schedules", schedules.add_schedule),
    ("GET", "/schedules/{name}", schedules.show_schedule),
    ("PATCH", "/schedules/{name}", schedules.change_schedule),
    ("DELETE", "/schedules/{name}", schedules.remove_schedule),
    ("POST", "/schedules/{name}/run", schedules.run_schedule),
    ("GET", "/actions", actions.list_actions),
    ("GET", "/health", monitoring.show_health),
    ("GET", "/health/live", monitoring.show_live),
    ("GET", "/health/ready", monitoring.show_ready),
    ("GET", "/metrics", monitoring.show_metrics),
    ("GET", "/docs", docs.show_page),
    ("GET", "/docs/{name}", docs.show_file),
    ("GET", "/openapi.json", docs.show_openapi),
)
"""Every route; openapi.py describes them."""


def create_app(
    agent: Agent, *, agents: Mapping[str, Agent], bell: Bell | None, waiting: Waiting
) -> FastAPI:
    """Make the front of an agent.

    agents: all declared ones, by name. bell: None accepts too, and the relay rings. waiting: shared
    by all the fronts of a process.
    """
    if agent.default_action:
        agent.get(agent.default_action)
    metrics = FrontMetrics(agent.name)
    app = _App(
        title=agent.name,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.front = Front(
        agent=agent,
        agents=agents,
        bell=bell,
        waiting=waiting,
        metrics=metrics,
        positions=Positions(),
        health=Health(agent, bell),
        sample=Sample() if agent.name == SAMPLER else None,
        group=Group(),
        outcomes=Outcomes(),
    )
    app.add_middleware(Entrance, metrics=metrics, agent=agent.name)
    app.router.routes.extend(_routes())
    document = openapi.describe(agent)
    app.openapi = lambda: document  # type: ignore[method-assign]
    return app


class _App(FastAPI):
    """FastAPI without the layers that no route here needs; each is paid for by every request.

    `Entrance` answers what is refused or fails; no route has dependencies, and FastAPI's telemetry
    looks for its configuration at each request.
    """

    def build_middleware_stack(self) -> ASGIApp:
        app: ASGIApp = self.router
        for layer, args, options in reversed(self.user_middleware):
            app = layer(app, *args, **options)
        return app


class _Route(Route):
    """A route that leaves its template for the metrics; its endpoint reads the request itself."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        if match is Match.PARTIAL and not self.param_convertors:
            match = Match.FULL  # GET /tasks/batch asks for no task of this name: it is a 405
        if match is not Match.NONE:
            child_scope["route"] = self
        return match, child_scope


def _routes() -> list[_Route]:
    """Return one route a path, so that a wrong method is 405 and names the right ones."""
    paths: dict[str, dict[str, Endpoint]] = {}
    for method, path, endpoint in ROUTES:
        paths.setdefault(path, {})[method] = endpoint
    return [
        _Route(path, _ByMethod(endpoints), methods=[*endpoints])
        for path, endpoints in paths.items()
    ]


class _ByMethod:
    """The endpoints of one path, as an application: Starlette wraps functions once more."""

    def __init__(self, endpoints: Mapping[str, Endpoint]) -> None:
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        method = "GET" if request.method == "HEAD" else request.method
        answer = await self._endpoints[method](request)
        await answer(scope, receive, send)
