"""The deployed form names every agent, and is what Compose accepts."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sutazai.agent import Agent
from sutazai.tasks import BUILT_IN

ROOT = Path(__file__).parents[2]


def _agent(reference: str) -> Agent:
    module, _, attribute = reference.partition(":")
    agent: Agent = getattr(importlib.import_module(module), attribute)
    return agent


AGENTS = [_agent(reference) for reference in BUILT_IN]


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    found: dict[str, Any] = document["services"]
    return found


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.name)
def test_every_agent_has_a_front_and_a_worker(services: dict[str, Any], agent: Agent) -> None:
    front, worker = services[agent.name], services[f"worker-{agent.name}"]
    assert front["command"] == ["api", agent.name]
    assert front["ports"] == [f"${{SUTAZAI_PUBLISH:-127.0.0.1}}:{agent.port}:{agent.port}"]
    assert f":{agent.port}/health/ready" in front["healthcheck"]["test"][-1]
    assert worker["command"] == ["worker", agent.name]
    # A worker drains for 25 s, and its children have 10 s more.
    assert worker["stop_grace_period"] == "45s"


def test_nothing_else_is_run(services: dict[str, Any]) -> None:
    names = {agent.name for agent in AGENTS}
    assert set(services) == {
        *names,
        *(f"worker-{name}" for name in names),
        *("postgresql", "valkey", "migrate", "relay", "beat", "flower"),
    }


def test_ports_are_published_on_loopback_and_stores_not_at_all(services: dict[str, Any]) -> None:
    for service in services.values():
        for port in service.get("ports", []):
            assert port.startswith("${SUTAZAI_PUBLISH:-127.0.0.1}:")
    assert "ports" not in services["postgresql"]
    assert "ports" not in services["valkey"]


def test_notices_are_never_evicted(services: dict[str, Any]) -> None:
    command = services["valkey"]["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


def test_the_schema_is_made_before_anything_uses_it(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if name not in ("postgresql", "valkey", "migrate"):
            condition = service["depends_on"]["migrate"]["condition"]
            assert condition == "service_completed_successfully", name


def test_compose_accepts_the_file() -> None:
    done = _compose({"POSTGRES_PASSWORD": "secret", "FLOWER_BASIC_AUTH": "user:secret"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["POSTGRES_PASSWORD", "FLOWER_BASIC_AUTH"])
def test_a_missing_password_is_named(missing: str) -> None:
    given = {"POSTGRES_PASSWORD": "secret", "FLOWER_BASIC_AUTH": "user:secret"}
    del given[missing]
    done = _compose(given)
    assert done.returncode != 0
    assert missing in done.stderr


def _compose(passwords: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `docker-compose config`, which needs no engine; skip where there is none, not in CI."""
    program = shutil.which("docker-compose")
    if program is None:
        message = "docker-compose is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    command = [program, "--file", str(ROOT / "docker-compose.yml"), "config", "--quiet"]
    kept = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        command, env=kept | passwords, capture_output=True, text=True, check=False
    )
