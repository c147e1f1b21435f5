"""The whole system, started once as a user starts it."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import pytest

from sutazai.settings import read_env_file

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
AGENTS = {
    "hardware-resource-optimizer": 8002,
    "task-assignment-coordinator": 8551,
    "multi-agent-coordinator": 8587,
    "resource-arbitration-agent": 8588,
    "ai-agent-orchestrator": 8589,
    "ollama-integration-specialist": 11015,
    "ai-metrics-exporter": 11063,
}
EXTRA = {"probe": 8190, "crawler": 8101}
STORES = {"flower": 5555, "postgresql": 10_000, "valkey": 10_001}


def eventually(condition: Callable[[], Any], within_s: float, what: str = "") -> Any:
    """Return the first true value of a condition; fail when it takes too long."""
    until = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > until:
            pytest.fail(f"not within {within_s} s: {what or condition}")
        time.sleep(0.05)


_kept: dict[int, IO[str]] = {}
"""Files locked by this process, an offset each, so that no other suite takes it meanwhile."""


def free_offset(start: int = 2000) -> int:
    """Return an offset under which every port of the system is free."""
    ports = [*AGENTS.values(), *EXTRA.values(), *STORES.values()]
    for offset in range(start, 30_000, 500):
        if offset not in _kept:
            file = Path(tempfile.gettempdir(), f"sutazai-offset-{offset}").open("a")  # noqa: SIM115 - kept
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _kept[offset] = file
        try:
            for port in ports:
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port + offset))
        except OSError:
            continue
        return offset
    raise RuntimeError("no free ports")


@dataclass
class System:
    """A running `sutazai up`."""

    home: Path
    offset: int
    env: dict[str, str]
    process: subprocess.Popen[str]
    client: httpx.Client

    def url(self, agent: str, path: str = "") -> str:
        return f"http://127.0.0.1:{(AGENTS | EXTRA)[agent] + self.offset}{path}"

    def process_task(self, agent: str, action: str, prefer: str = "", **params: Any) -> Any:
        headers = {"Prefer": prefer} if prefer else {}
        return self.client.post(
            self.url(agent, "/process"), json={"action": action, **params}, headers=headers
        )

    def submit(self, agent: str, action: str, **params: Any) -> str:
        answer = self.process_task(agent, action, "respond-async", **params)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    def task(self, task_id: str, wait_s: int = 0) -> dict[str, Any]:
        answer = self.client.get(self.url("probe", f"/tasks/{task_id}"), params={"wait": wait_s})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def health(self, agent: str) -> dict[str, Any]:
        return dict(self.client.get(self.url(agent, "/health")).json())

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of the virtual environment, as a user would."""
        command, *rest = arguments
        return subprocess.run(
            [BIN / command, *rest],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **{"cwd": self.home.parent, **options},
        )

    def program(self, name: str) -> psutil.Process:
        """Return the process that supervisord runs under a name."""
        from sutazai.embedded import Supervisor

        [found] = [state for state in Supervisor(self.home).programs() if state.name == name]
        return psutil.Process(found.pid)


def start(home: Path, offset: int, *arguments: str, **extra_env: str) -> System:
    """Start `sutazai up`, and return when it printed its table."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SUTAZAI_")}
    env |= {"SUTAZAI_HOME": str(home), "XDG_STATE_HOME": str(home.parent / "state")}
    env["PATH"] = f"{BIN}:{env.get('PATH', '')}"
    env |= extra_env
    process = subprocess.Popen(
        [BIN / "sutazai", "up", "--port-offset", str(offset), *arguments],
        env=env,
        cwd=home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    env["SUTAZAI_PORT_OFFSET"] = str(offset)
    try:
        _await_table(process, home)
    except BaseException:
        process.send_signal(signal.SIGINT)  # whoever was interrupted cannot stop it any more
        process.wait(60)
        raise
    return System(home, offset, env, process, httpx.Client(timeout=60))


def _await_table(process: subprocess.Popen[str], home: Path) -> None:
    printed = []
    assert process.stdout
    for line in process.stdout:
        printed.append(line)
        if line.startswith("Started in"):
            return
    logs = "\n".join(
        f"== {log.name}\n{log.read_text()[-1500:]}" for log in (home / "log").glob("*.log")
    )
    raise AssertionError(f"up ended with {process.wait()}: {''.join(printed)}\n{logs}")


def stop(system: System) -> int:
    """Press Ctrl-C, and return the exit code."""
    system.client.close()
    if system.process.poll() is None:
        system.process.send_signal(signal.SIGINT)
    code = system.process.wait(60)
    assert system.process.stdout
    system.process.stdout.close()
    return code


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Start everything, with the example package installed and an agent without packaging."""
    site = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--target", str(site), str(ROOT / "examples" / "crawler")),
        ],
        check=True,
        timeout=100,
    )
    home = tmp_path_factory.mktemp("system") / ".sutazai"
    path = f"{site}:{Path(__file__).parent / 'agents'}"
    running = start(home, free_offset(), "--agent", "probe:agent", PYTHONPATH=path)
    running.env["SUTAZAI_AGENTS"] = "probe:agent"
    yield running
    stop(running)


@pytest.fixture
def env_file(system: System) -> dict[str, str]:
    return dict(read_env_file(system.home / "env"))
