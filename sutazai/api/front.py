"""What the routes of one front share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request

from sutazai.agent import Agent
from sutazai.api.group import Group
from sutazai.api.health import Health
from sutazai.api.outcomes import Outcomes
from sutazai.api.position import Positions
from sutazai.api.sample import Sample
from sutazai.api.waiting import Waiting
from sutazai.bell import Bell
from sutazai.metrics import FrontMetrics


@dataclass(frozen=True)
class Front:
    """One agent's front."""

    agent: Agent
    agents: Mapping[str, Agent]
    bell: Bell | None
    waiting: Waiting
    metrics: FrontMetrics
    positions: Positions
    health: Health
    sample: Sample | None
    group: Group
    outcomes: Outcomes


def front_of(request: Request) -> Front:
    """Return the front that a request came to."""
    front: Front = request.app.state.front
    return front
