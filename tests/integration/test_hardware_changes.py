"""Plans carried out for real, with audit rows, and taken back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest

from sutazai import db
from sutazai.agent import Action
from sutazai.errors import InvalidInput
from sutazai.settings import settings
from sutazai.tasks.hardware_resource_optimizer import (
    agent,
    duplicate,
    plan,
    quarantine,
    remedy,
    sampling,
    tables,
)
from sutazai.tasks.hardware_resource_optimizer.item import PlanItem
from sutazai.tasks.hardware_resource_optimizer.measurement import Meter
from sutazai.tasks.hardware_resource_optimizer.reading import Metrics
from sutazai.testing import RecordedContext, context

KIB = 1024
READING = Meter().read("here")


@pytest.fixture(autouse=True)
def quiet(database: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A clean database, a home of our own, and a newest reading that can be changed."""
    changes: dict[str, Any] = {}

    def newest(*arguments: object, **named: object) -> Metrics:
        return READING.model_copy(update=changes)

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(settings(), "home", home)
    monkeypatch.setattr(sampling, "newest", newest)
    monkeypatch.setattr(remedy, "_SETTLING_S", 0.0)
    return changes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three equal files of 200 KiB, an old one of 300 KiB, and a young one."""
    root = tmp_path / "tree"
    (root / "deep").mkdir(parents=True)
    fill(root / "one", b"a", 200, 90)
    fill(root / "two", b"a", 200, 60)
    fill(root / "deep" / "three", b"a", 200, 50)
    fill(root / "old", b"b", 300, 60)
    fill(root / "young", b"c", 300, 1)
    return root


def fill(path: Path, content: bytes, kib: int, age_days: float) -> None:
    path.write_bytes(content * kib * KIB)
    then = time.time() - age_days * 86_400
    os.utime(path, (then, then))


def call(name: str, seen: RecordedContext | None = None, **params: Any) -> Any:
    """Call an action plainly and commit what it writes, as a worker does."""
    action: Action[Any, Any] = agent.get(name)
    seen = seen or context(host="here")
    result = action(action.parse(params), seen)
    action.dump(result)  # type: ignore[arg-type]
    with db.transaction() as connection:
        for statement in seen.written:
            connection.execute(statement)
    return result


def audit(**wanted: Any) -> list[Any]:
    query = tables.audit.select().filter_by(**wanted).order_by(tables.audit.c.started_at)
    with db.transaction() as connection:
        return list(connection.execute(query))


def used_bytes(*roots: Path) -> int:
    """What the files below these folders take up, each inode once."""
    states = [os.lstat(path) for root in roots for path in root.rglob("*") if path.is_file()]
    return sum({(s.st_dev, s.st_ino): s.st_blocks * 512 for s in states}.values())


def contents(root: Path) -> dict[str, tuple[bytes, int, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


def test_real_run_frees_what_it_reports_and_is_taken_back(tree: Path) -> None:
    before, before_bytes = contents(tree), used_bytes(tree, settings().home)
    result = call("optimize_disk", paths=[str(tree)], dry_run=False)
    assert {item.outcome for item in result.applied} == {"applied"}
    kinds = sorted(item.kind for item in result.applied)
    assert kinds == ["hardlink_duplicate", "hardlink_duplicate", "quarantine_file"]
    freed = before_bytes - used_bytes(tree, settings().home)
    # The manifest of the quarantined file takes up a block of its own.
    manifest = sum(p.stat().st_blocks * 512 for p in settings().home.rglob("manifest.json"))
    assert result.measured_gain["disk_bytes"] == freed + manifest == 400 * KIB
    assert result.measured_gain["quarantined_bytes"] == 300 * KIB
    assert not (tree / "old").exists()
    assert (tree / "young").exists()
    assert "quarantined" in {item.rule for item in result.suggestions}
    rows = audit(plan_id=result.plan_id)
    assert {row.outcome for row in rows} == {"applied"}
    assert {row.host for row in rows} == {"here"}
    assert all(row.undo and row.finished_at for row in rows)

    for item in result.applied:
        done = call("rollback", audit_id=str(item.audit_id))
        assert done.reverses == item.audit_id
    assert contents(tree) == before
    assert used_bytes(tree, settings().home) == before_bytes
    assert {row.outcome for row in audit(plan_id=result.plan_id)} == {"rolled_back"}
    assert len(audit(outcome="applied")) == 3, "each rollback has a row of its own"


def test_dry_run_is_stored_and_its_items_are_applied_by_name(tree: Path) -> None:
    before = contents(tree)
    result = call("optimize_disk", paths=[str(tree)])
    assert contents(tree) == before
    assert audit() == []
    (move,) = [item for item in result.plan if item.kind == "quarantine_file"]
    done = call("apply", plan_id=str(result.plan_id), item_ids=[move.id])
    assert [item.outcome for item in done.applied] == ["applied"]
    assert done.measured_gain == {"disk_bytes": 0, "quarantined_bytes": 300 * KIB}
    assert not (tree / "old").exists()
    assert (tree / "two").stat().st_nlink == 1, "what was not named was not done"

    again = call("apply", plan_id=str(result.plan_id), item_ids=[move.id])
    assert [item.outcome for item in again.applied] == ["refused"]
    call("rollback", audit_id=str(done.applied[0].audit_id))
    assert contents(tree) == before
    once_more = call("apply", plan_id=str(result.plan_id), item_ids=[move.id])
    assert [item.outcome for item in once_more.applied] == ["applied"]


def test_purge_frees_what_it_reports(tree: Path) -> None:
    result = call("optimize_disk", paths=[str(tree)], dry_run=False, retention_days=7)
    (moved,) = [item for item in result.applied if item.kind == "quarantine_file"]
    assert call("purge_quarantine").purged == [], "its time has not come"
    told = call("purge_quarantine", audit_ids=[str(moved.audit_id)], dry_run=True)
    assert [file.freed_bytes for file in told.purged] == [300 * KIB]
    assert told.measured_gain == {"disk_bytes": 0}
    before = used_bytes(tree, settings().home)
    manifest = sum(p.stat().st_blocks * 512 for p in settings().home.rglob("manifest.json"))
    done = call("purge_quarantine", audit_ids=[str(moved.audit_id)])
    assert before - used_bytes(tree, settings().home) - manifest == 300 * KIB
    assert done.measured_gain == {"disk_bytes": 300 * KIB}
    assert [row.outcome for row in audit(id=moved.audit_id)] == ["purged"]
    with pytest.raises(InvalidInput, match="deleted for good"):
        call("rollback", audit_id=str(moved.audit_id))
    with pytest.raises(InvalidInput, match="quarantine"):
        call("purge_quarantine", audit_ids=[str(moved.audit_id)])


def test_retention_that_has_ended_is_purged_without_being_named(tree: Path) -> None:
    call("optimize_disk", paths=[str(tree)], dry_run=False, retention_days=0)
    assert [file.path for file in call("purge_quarantine").purged] == [str(tree / "old")]
    assert list(quarantine.folder_for(tree / "old").iterdir()) == []


def test_item_that_has_changed_is_refused_and_the_others_are_done(tree: Path) -> None:
    result = call("optimize_disk", paths=[str(tree)])
    (tree / "old").write_text("changed")
    ids = [item.id for item in result.plan]
    done = call("apply", plan_id=str(result.plan_id), item_ids=ids)
    outcomes = {item.kind: item.outcome for item in done.applied}
    assert outcomes == {"hardlink_duplicate": "applied", "quarantine_file": "refused"}
    (row,) = audit(outcome="refused")
    assert "changed" in row.message
    with pytest.raises(InvalidInput, match="cannot be undone"):
        call("rollback", audit_id=str(row.id))


def test_failure_half_way_is_told_and_can_be_tried_again(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(quarantine.os, "rename", refuse)
        result = call("optimize_disk", paths=[str(tree)], dry_run=False)
    failed = [item for item in result.applied if item.outcome == "failed"]
    assert [item.kind for item in failed] == ["quarantine_file"]
    assert "Invalid cross-device link" in failed[0].message
    assert (tree / "old").exists()
    assert result.measured_gain == {"disk_bytes": 400 * KIB}
    done = call("apply", plan_id=str(result.plan_id), item_ids=[failed[0].item_id])
    assert [item.outcome for item in done.applied] == ["applied"]


def refuse(*arguments: object, **named: object) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_task_that_died_half_way_goes_on_with_its_own_row(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the change and before its outcome: the same task knows, others are refused."""
    result = call("optimize_disk", paths=[str(tree)])
    (move,) = [item for item in result.plan if item.kind == "quarantine_file"]
    wanted = {"plan_id": str(result.plan_id), "item_ids": [move.id]}
    first = context(host="here")
    with monkeypatch.context() as dying:
        dying.setattr(remedy, "_end", die)
        with pytest.raises(KeyboardInterrupt):
            call("apply", first, **wanted)
    assert not (tree / "old").exists()
    (row,) = audit()
    assert (row.outcome, row.task_id) == ("started", first.task_id)

    other = call("apply", **wanted)
    assert [item.outcome for item in other.applied] == ["refused"]
    again = call("apply", context(host="here", task_id=first.task_id), **wanted)
    assert [(item.outcome, item.audit_id) for item in again.applied] == [("applied", row.id)]
    call("rollback", audit_id=str(row.id))
    assert (tree / "old").exists()


def test_change_that_was_cut_short_can_be_rolled_back(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as dying:
        dying.setattr(quarantine.os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            call("optimize_disk", paths=[str(tree / "deep" / ".."), str(tree)][1:], dry_run=False)
    (row,) = audit(outcome="started")
    call("rollback", audit_id=str(row.id))
    assert (tree / "old").exists()


def die(*arguments: object, **named: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("apply", {"plan_id": str(uuid4()), "item_ids": ["x"]}, "no plan"),
        ("rollback", {"audit_id": str(uuid4())}, "no audit row"),
        ("purge_quarantine", {"audit_ids": [str(uuid4())]}, "quarantine"),
    ],
)
def test_unknown_ids_are_refused(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call(name, **params)


def test_unknown_items_and_other_hosts_are_refused(tree: Path) -> None:
    result = call("optimize_disk", paths=[str(tree)])
    with pytest.raises(InvalidInput, match="no item nonsense"):
        call("apply", plan_id=str(result.plan_id), item_ids=["nonsense"])
    with pytest.raises(InvalidInput, match="is for the host here"):
        call(
            "apply",
            context(host="elsewhere"),
            plan_id=str(result.plan_id),
            item_ids=[result.plan[0].id],
        )


def test_rollback_happens_once(tree: Path) -> None:
    result = call("optimize_disk", paths=[str(tree)], dry_run=False)
    audit_id = str(result.applied[0].audit_id)
    call("rollback", audit_id=audit_id)
    with pytest.raises(InvalidInput, match="already"):
        call("rollback", audit_id=audit_id)


def test_cancelled_run_leaves_the_rest(tree: Path) -> None:
    seen = context(host="here")
    dry = call("optimize_disk", paths=[str(tree)])
    seen.cancelled = True
    done = call("apply", seen, plan_id=str(dry.plan_id), item_ids=[item.id for item in dry.plan])
    assert {item.outcome for item in done.applied} == {"skipped"}
    assert audit() == []


def test_process_is_stopped_only_when_it_is_named(quiet: dict[str, Any]) -> None:
    code = "x = bytearray(b'1') * (50 << 20); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as hog:
        assert hog.stdout is not None
        hog.stdout.readline()
        large = READING.top_processes[0].model_copy(
            update={
                "pid": hog.pid,
                "started_at": psutil.Process(hog.pid).create_time(),
                "memory_percent": 60.0,
            }
        )
        quiet |= {"memory_percent": 95.0, "top_processes": [large]}
        result = call("optimize_memory", dry_run=False)
        (item,) = [item for item in result.plan if item.kind == "stop_process"]
        assert hog.poll() is None
        assert result.applied == []
        assert result.measured_gain == {"memory_bytes": 0}
        done = call("apply", plan_id=str(result.plan_id), item_ids=[item.id])
        assert hog.wait(5) == -15
    assert [entry.outcome for entry in done.applied] == ["applied"]
    assert done.applied[0].gain["memory_bytes"] > 50 << 20
    assert "memory_bytes" in done.measured_gain
    with pytest.raises(InvalidInput, match="cannot be undone"):
        call("rollback", audit_id=str(done.applied[0].audit_id))


def test_two_tasks_cannot_carry_out_one_item(tree: Path) -> None:
    result = call("optimize_disk", paths=[str(tree)])
    item: PlanItem = result.plan[0]
    row = {
        "id": uuid4(),
        "task_id": uuid4(),
        "host": "here",
        "plan_id": result.plan_id,
        "item_id": item.id,
        "kind": item.kind,
        "target": item.target,
        "undo": {},
    }
    with db.transaction() as connection:
        assert connection.execute(tables.begin(row)).first()
        assert connection.execute(tables.begin({**row, "id": uuid4()})).first() is None


def test_plan_is_stored_as_it_was_told(tree: Path) -> None:
    result = call("optimize_disk", paths=[str(tree)])
    assert isinstance(result, plan.Optimization)
    assert isinstance(result.plan_id, UUID)
    with db.transaction() as connection:
        row = connection.execute(tables.find_plan(result.plan_id)).one()
    assert row.resource == "disk"
    assert [PlanItem.model_validate(item) for item in row.items] == result.plan


def test_links_that_share_an_inode_already_free_nothing(tree: Path) -> None:
    call("optimize_disk", paths=[str(tree)], dry_run=False)
    second = call("optimize_disk", paths=[str(tree)], dry_run=False)
    assert "hardlink_duplicate" not in {item.kind for item in second.applied}
    assert second.measured_gain == {"disk_bytes": 0}
    assert duplicate.HEAD_BYTES < 200 * KIB, "the whole files were compared"
