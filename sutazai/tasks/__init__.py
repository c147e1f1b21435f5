"""The agents: those that come with the system, and how those of others are found.

Add an agent here, as an entry point of the group `sutazai.agents`, or in `SUTAZAI_AGENTS`; each
names `module:agent`.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from sutazai.agent import Agent, normalise
from sutazai.errors import ConfigurationError, DeclarationError, UnknownAgent
from sutazai.settings import settings

BUILT_IN = (
    "sutazai.tasks.hardware_resource_optimizer:agent",
    "sutazai.tasks.task_assignment_coordinator:agent",
    "sutazai.tasks.multi_agent_coordinator:agent",
    "sutazai.tasks.resource_arbitration_agent:agent",
    "sutazai.tasks.ai_agent_orchestrator:agent",
    "sutazai.tasks.ollama_integration_specialist:agent",
    "sutazai.tasks.ai_metrics_exporter:agent",
)

GROUP = "sutazai.agents"


@dataclass
class Agents:
    """Every declared agent by name, and why those that are missing could not be imported."""

    agents: dict[str, Agent] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    def get(self, name: str) -> Agent:
        """Return an agent; underscores in its name mean hyphens. Raises `UnknownAgent`."""
        agent = self.agents.get(normalise(name))
        if agent is None:
            known = ", ".join(self.agents)
            raise UnknownAgent(f"There is no agent {name!r}; there are: {known}.")
        return agent

    def choose(self, names: str | None) -> list[Agent]:
        """Return the agents of a list `a,b`; all for None or `all`."""
        if not names or names.strip() == "all":
            return list(self.agents.values())
        return [self.get(name) for name in names.split(",") if name.strip()]


@cache
def load() -> Agents:
    """Import every agent once. One that cannot be imported is named in `faults`, with its place."""
    found = Agents()
    if settings().agents and str(Path.cwd()) not in sys.path:
        # An agent without packaging usually is a file in this folder.
        sys.path.insert(0, str(Path.cwd()))
    for reference in _references():
        try:
            _add(found, _import(reference))
        except Exception as error:
            found.faults[reference] = _place(error)
    return found


def _references() -> list[str]:
    references = [*BUILT_IN]
    references += [point.value for point in entry_points(group=GROUP)]
    references += settings().agents
    return list(dict.fromkeys(references))


def _import(reference: str) -> Agent:
    module, separator, attribute = reference.partition(":")
    if not separator:
        raise ConfigurationError(f"{reference!r} is not module:agent.")
    agent = getattr(importlib.import_module(module), attribute)
    if not isinstance(agent, Agent):
        raise DeclarationError(f"{reference} is {type(agent).__name__}, not an Agent.")
    return agent


def _add(found: Agents, agent: Agent) -> None:
    if agent.name in found.agents:
        raise DeclarationError(f"There are two agents named {agent.name}.")
    for other in found.agents.values():
        if other.port == agent.port:
            raise DeclarationError(f"{agent.name} and {other.name} both have port {agent.port}.")
    found.agents[agent.name] = agent


def _place(error: Exception) -> str:
    """Say what went wrong and at which line of the agent's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).parent)
    own = [
        frame
        for frame in frames
        if "importlib" not in frame.filename
        and frame.filename != __file__
        and not frame.filename.endswith("sutazai/agent.py")
    ]
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text} ({error.filename}:{error.lineno})"
    if own and (here in own[-1].filename or own[-1].lineno):
        return f"{text} ({own[-1].filename}:{own[-1].lineno})"
    return text
