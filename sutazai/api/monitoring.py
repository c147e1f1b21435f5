"""`/health` and `/metrics`: what monitors read."""

from __future__ import annotations

from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from sutazai.api.answer import json_answer
from sutazai.api.front import front_of
from sutazai.api.health import read_status


async def show_health(request: Request) -> Response:
    """Tell how the agent does: 200 when healthy or degraded, 503 when unhealthy."""
    front = front_of(request)
    report, body = await front.health.body()
    if front.sample is not None:
        body["last_metrics"] = await front.sample.latest()
    return json_answer(body, 503 if report.status == "unhealthy" else 200)


async def show_live(request: Request) -> Response:
    """Tell that the process answers."""
    return json_answer({"status": "live", "agent": front_of(request).agent.name})


async def show_ready(request: Request) -> Response:
    """Tell that work can be accepted; 503 when PostgreSQL is away."""
    agent = front_of(request).agent.name
    await read_status(agent)
    return json_answer({"status": "ready", "agent": agent})


async def show_metrics(request: Request) -> Response:
    """Return the front's metrics, or the latest hardware sample where JSON is asked for."""
    front = front_of(request)
    accept = request.headers.get("accept", "")
    if front.sample is not None and "application/json" in accept.lower():
        return json_answer(await front.sample.require())
    report = await front.health.report()
    front.metrics.set_healthy(report.status == "healthy")
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # it compares versions that are no numbers
        encode, content_type = choose_encoder("")
    return Response(encode(front.metrics.registry), headers={"Content-Type": content_type})
