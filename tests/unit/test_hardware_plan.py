"""Plans: what they hold, that a dry run changes nothing, and how pools are tuned."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from sutazai.agent import Agent, WorkerView
from sutazai.errors import InvalidInput, Unsupported
from sutazai.settings import settings
from sutazai.tasks.hardware_resource_optimizer import (
    agent,
    engine,
    optimize_all,
    optimize_cpu,
    optimize_disk,
    optimize_memory,
    plan,
    pool,
    protection,
    sampling,
    tune_pools,
)
from sutazai.tasks.hardware_resource_optimizer.engine import UnloadModel
from sutazai.tasks.hardware_resource_optimizer.measurement import Meter
from sutazai.tasks.hardware_resource_optimizer.pool import ResizePool
from sutazai.tasks.hardware_resource_optimizer.reading import (
    DiskUsage,
    Metrics,
    Pressure,
    Psi,
    Stall,
)
from sutazai.testing import NoSystem, RecordedContext, context

KIB = 1024
GIB = 1 << 30
READING = (
    Meter()
    .read("here")
    .model_copy(
        update={
            "psi": Psi(),
            "top_processes": [],
            "cpu_percent": 5.0,
            "cpu_count": 8,
            "memory_percent": 20.0,
            "memory_total": 16 * GIB,
            "memory_available": 12 * GIB,
            "disk_usage": {
                "/dev/x": DiskUsage(total=9, used=3, free=6, percent=30.0, mountpoint="/")
            },
        }
    )
)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The newest reading is a quiet one, with these changes; no model server, a home of our own."""
    changes: dict[str, Any] = {}

    def newest(*arguments: object, **named: object) -> Metrics:
        return READING.model_copy(update=changes)

    monkeypatch.setattr(sampling, "newest", newest)
    monkeypatch.setattr(settings(), "home", tmp_path / "home")
    monkeypatch.setattr(settings(), "ollama_url", "http://127.0.0.1:1")
    (tmp_path / "home").mkdir()
    return changes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two equal files, an old one, a young one, and a link that leads out."""
    root = tmp_path / "tree"
    (root / "deep").mkdir(parents=True)
    fill(root / "one", b"same", 90)
    fill(root / "deep" / "two", b"same", 60)
    fill(root / "old", b"old", 60)
    fill(root / "young", b"young", 1)
    fill(tmp_path / "outside", b"same", 60)
    (root / "escape").symlink_to(tmp_path)
    (root / "file-link").symlink_to(tmp_path / "outside")
    return root


def fill(path: Path, content: bytes, age_days: float) -> None:
    path.write_bytes(content * 10 * KIB)
    then = time.time() - age_days * 86_400
    os.utime(path, (then, then))


def digest(root: Path) -> str:
    """Hash everything that can be seen of a tree: names, attributes, contents, times."""
    seen = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        state = path.lstat()
        what = (str(path), state.st_mode, state.st_ino, state.st_nlink, state.st_mtime_ns)
        seen.update(repr(what).encode())
        if stat.S_ISREG(state.st_mode):
            seen.update(repr(state.st_atime_ns).encode() + path.read_bytes())
    return seen.hexdigest()


def optimize(action: Any, seen: RecordedContext | None = None, **params: Any) -> plan.Optimization:
    result = action(action.parse(params), seen or context(host="here"))
    assert isinstance(result, plan.Optimization)
    assert action.dump(result)
    return result


def test_dry_run_plans_for_the_tree_and_changes_nothing(
    now: dict[str, Any], tree: Path, tmp_path: Path
) -> None:
    for path in tree.rglob("*"):
        if path.is_file():
            path.read_bytes()  # so that looking at them in digest() changes no access time
    before = digest(tree)
    seen = context(host="here")
    result = optimize(optimize_disk, seen, paths=[str(tree)])
    assert digest(tree) == before
    kinds = {Path(item.target).name: item.kind for item in result.plan}
    assert kinds == {"two": "hardlink_duplicate", "old": "quarantine_file"}
    assert str(tmp_path / "outside") not in {item.target for item in result.plan}
    assert result.dry_run is True
    assert result.applied == []
    assert result.measured_gain is None
    assert result.degraded is True
    assert all(item.reversible for item in result.plan)
    (statement,) = seen.written
    stored = statement.compile().params
    assert stored["id"] == result.plan_id
    assert stored["items"] == [item.model_dump(mode="json") for item in result.plan]


@pytest.mark.parametrize("bounds", [{"min_age_days": 100}, {"max_bytes": 100}])
def test_bounds_hold(now: dict[str, Any], tree: Path, bounds: dict[str, Any]) -> None:
    assert optimize(optimize_disk, paths=[str(tree)], **bounds).plan == []


def test_open_file_is_left_alone(now: dict[str, Any], tree: Path) -> None:
    with (tree / "old").open("rb"):
        result = optimize(optimize_disk, paths=[str(tree)])
    assert "quarantine_file" not in {item.kind for item in result.plan}
    (search,) = [item for item in result.suggestions if item.rule == "searched"]
    assert search.evidence["spared_because_open"] == 1


def test_protected_folder_inside_is_skipped(
    now: dict[str, Any], tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protection, "SYSTEM_ROOTS", (tree / "deep",))
    targets = {item.target for item in optimize(optimize_disk, paths=[str(tree)]).plan}
    assert str(tree / "old") in targets
    assert not any(target.startswith(str(tree / "deep")) for target in targets)


@pytest.mark.parametrize("dry_run", [True, False])
def test_protected_and_linked_paths_are_refused(
    now: dict[str, Any], tree: Path, dry_run: bool
) -> None:
    for path in ("/etc", "/usr/share", "/", str(tree / "escape"), "relative", f"{tree}/none"):
        with pytest.raises(InvalidInput):
            optimize(optimize_disk, paths=[str(tree), path], dry_run=dry_run)


def test_nothing_is_planned_below_the_threshold(now: dict[str, Any]) -> None:
    result = optimize(optimize_all)
    assert result.plan == []
    assert {item.rule for item in result.suggestions} == {"below_threshold"}
    assert result.current_usage.memory_percent == 20.0


def test_memory_is_planned_for_under_pressure(now: dict[str, Any]) -> None:
    now["memory_percent"] = 91.0
    system = FakeSystem([worker("agent-a", slots=3, running=1), worker("agent-b", slots=1)])
    result = optimize(optimize_memory, context(host="here", system=system, agents=AGENTS))
    assert [(item.kind, item.target) for item in result.plan] == [
        ("shrink_pool", "agent-a on here")
    ]
    assert "memory_high" in {item.rule for item in result.suggestions}
    assert system.resized == []


def test_stalls_count_as_pressure_at_low_use(now: dict[str, Any]) -> None:
    now["psi"] = Psi(cpu=stalled(60))
    system = FakeSystem([worker("agent-a", slots=3, running=1)])
    result = optimize(optimize_cpu, context(host="here", system=system, agents=AGENTS))
    assert [item.kind for item in result.plan] == ["shrink_pool"]


@pytest.mark.parametrize(
    "params",
    [{"nice": 0}, {"threshold_percent": 101}, {"min_age_days": -1}, {"unknown": 1}, {"paths": "/"}],
)
def test_bad_parameters_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        optimize_disk.parse(params)


def test_every_action_takes_the_same_parameters() -> None:
    for name in ("optimize_memory", "optimize_cpu", "optimize_disk", "optimize_all"):
        assert {
            "threshold_percent",
            "dry_run",
            "paths",
            "min_age_days",
            "max_bytes",
            "nice",
        } <= set(agent.actions[name].params_schema["properties"])


# --- pools ----------------------------------------------------------------------------------

AGENTS = {
    name: Agent(name, port=port, doc="An agent.", slots=(1, 2, 4))
    for port, name in enumerate(("agent-a", "agent-b"), start=9000)
}


@dataclass
class FakeSystem(NoSystem):
    """A system with these workers, which does what it is told."""

    views: list[WorkerView] = field(default_factory=list)
    resized: list[tuple[str, str, int]] = field(default_factory=list)

    def workers(self) -> list[WorkerView]:
        return self.views

    def resize(self, agent: str, host: str, slots: int) -> int:
        self.resized.append((agent, host, slots))
        return slots


def worker(
    name: str, *, slots: int = 2, running: int = 0, queued: int = 0, host: str = "here"
) -> WorkerView:
    return WorkerView(f"{name}@{host}", name, host, 2**22 + 1, slots, running, 0.1, queued)


def stalled(percent: float) -> Pressure:
    return Pressure(some=Stall(avg10=percent, avg60=percent, avg300=percent, total_us=1))


def tuned(*views: WorkerView, **params: Any) -> list[tuple[str, int, int]]:
    seen = context(host="here", system=FakeSystem(list(views)), agents=AGENTS)
    result = optimize(tune_pools, seen, **params)
    changes = [pool.PoolEvidence.model_validate(item.evidence) for item in result.plan]
    return [(item.agent, item.slots_before, item.slots_after) for item in changes]


@pytest.mark.parametrize(
    "pressure",
    [{"memory_percent": 95.0}, {"cpu_percent": 95.0}, {"psi": Psi(memory=stalled(30))}],
)
def test_pressure_shrinks_pools_with_idle_slots(
    now: dict[str, Any], pressure: dict[str, Any]
) -> None:
    now |= pressure
    views = (
        worker("agent-a", slots=3, running=1, queued=50),
        worker("agent-b", slots=4, running=4),
    )
    assert tuned(*views) == [("agent-a", 3, 2)]


def test_pressure_with_every_slot_busy_shrinks_the_largest_pool_only(now: dict[str, Any]) -> None:
    now["memory_percent"] = 95.0
    assert tuned(worker("agent-a", slots=2, running=2), worker("agent-b", slots=4, running=4)) == [
        ("agent-b", 4, 3)
    ]


def test_backlog_grows_a_pool_up_to_its_bound(now: dict[str, Any]) -> None:
    assert tuned(worker("agent-a", slots=2, running=2, queued=50)) == [("agent-a", 2, 4)]
    assert tuned(worker("agent-a", slots=2, running=2, queued=1)) == [("agent-a", 2, 3)]


@pytest.mark.parametrize(
    "view",
    [
        worker("agent-a", slots=4, running=4, queued=50),
        worker("agent-a", slots=2, running=1, queued=50),
        worker("agent-a", slots=2, running=2, queued=0),
    ],
)
def test_pool_at_its_bound_or_with_room_is_left(now: dict[str, Any], view: WorkerView) -> None:
    assert tuned(view) == []


def test_growth_stays_within_the_room_of_the_host(now: dict[str, Any]) -> None:
    busy = worker("agent-a", slots=2, running=2, queued=50)
    # 10 % of 16 GiB stay free; beyond that there is room for one slot.
    now["memory_available"] = int(1.6 * GIB) + pool.SLOT_BYTES + pool.SLOT_BYTES // 2
    assert tuned(busy) == [("agent-a", 2, 3)]
    now["memory_available"] = 12 * GIB
    now["cpu_percent"] = 75.0  # of 8 cores, 90 % may be used: one is left
    assert tuned(busy) == [("agent-a", 2, 3)]
    now["cpu_percent"] = 85.0
    assert tuned(busy) == []


def test_longest_queue_gets_the_room(now: dict[str, Any]) -> None:
    now["cpu_percent"] = 75.0
    assert tuned(
        worker("agent-a", running=2, queued=3), worker("agent-b", running=2, queued=9)
    ) == [("agent-b", 2, 3)]


def test_each_host_is_tuned_by_its_own_sample(
    now: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    far = READING.model_copy(update={"host": "far", "memory_percent": 99.0})
    monkeypatch.setattr(sampling, "known", {"far": far}.get)
    assert tuned(
        worker("agent-a", slots=3, host="far"),
        worker("agent-b", running=2, queued=9),
        worker("agent-a", slots=3, host="silent"),
    ) == [("agent-a", 3, 2), ("agent-b", 2, 4)]


def test_without_workers_there_is_nothing_to_tune(now: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        tuned()


def test_resize_and_back(now: dict[str, Any]) -> None:
    system = FakeSystem([worker("agent-a", slots=3)])
    seen = context(host="here", system=system, agents=AGENTS)
    (item,) = ResizePool().propose(pool.shrinkable(seen, "here", "for a test"), seen)
    undo = ResizePool().prepare(item, seen, uuid4())
    assert ResizePool().carry_out(item, undo, seen) == {"slots": -1}
    ResizePool().undo(undo, seen)
    assert system.resized == [("agent-a", "here", 2), ("agent-a", "here", 3)]
    beyond = {**item.evidence, "slots_after": 9}
    with pytest.raises(InvalidInput, match="between 1 and 4"):
        ResizePool().prepare(item.model_copy(update={"evidence": beyond}), seen, uuid4())


# --- model server ---------------------------------------------------------------------------


class ModelServer(BaseHTTPRequestHandler):
    """The two routes of a model server that matter here."""

    loaded: dict[str, dict[str, int]]

    def do_GET(self) -> None:
        models = [{"name": name, **sizes} for name, sizes in self.loaded.items()]
        self.answer({"models": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("keep_alive") == 0:
            self.loaded.pop(body["model"], None)
        else:
            self.loaded[body["model"]] = {"size": 500, "size_vram": 0}
        self.answer({"done": True})

    def answer(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def model_server(
    now: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[ModelServer]]:
    handler = type("Handler", (ModelServer,), {"loaded": {"big": {"size": 900, "size_vram": 200}}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(settings(), "ollama_url", f"http://127.0.0.1:{server.server_port}")
        yield handler
        server.shutdown()


def test_loaded_model_is_unloaded_and_loaded_again(
    now: dict[str, Any], model_server: type[ModelServer]
) -> None:
    now["memory_percent"] = 95.0
    (item,) = optimize(optimize_memory).plan
    assert (item.kind, item.target) == ("unload_model", "big")
    assert item.expected_gain == {"memory_bytes": 700, "gpu_memory_bytes": 200}
    undo = UnloadModel().prepare(item, context(), uuid4())
    gain = UnloadModel().carry_out(item, undo, context())
    assert gain == {"memory_bytes": 700, "gpu_memory_bytes": 200}
    assert model_server.loaded == {}
    with pytest.raises(InvalidInput, match="not in memory"):
        UnloadModel().prepare(item, context(), uuid4())
    UnloadModel().undo(undo, context())
    assert set(model_server.loaded) == {"big"}


def test_without_a_model_server_here_nothing_is_unloaded(
    now: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.loaded_models() == []
    monkeypatch.setattr(settings(), "ollama_url", "http://models.example:11434")
    monkeypatch.setattr(engine.httpx, "get", lambda *a, **k: pytest.fail("it was asked"))
    assert engine.loaded_models() == []
