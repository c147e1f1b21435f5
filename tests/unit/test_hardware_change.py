"""Changes to files and processes, and their way back, without any service."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

from sutazai.agent import WorkerView
from sutazai.errors import InvalidInput
from sutazai.settings import settings
from sutazai.tasks.hardware_resource_optimizer import duplicate, process, quarantine
from sutazai.tasks.hardware_resource_optimizer.cgroup import ReclaimCgroup, Sources
from sutazai.tasks.hardware_resource_optimizer.duplicate import HardlinkDuplicate
from sutazai.tasks.hardware_resource_optimizer.item import Gain, PlanItem, Remedy
from sutazai.tasks.hardware_resource_optimizer.measurement import Meter
from sutazai.tasks.hardware_resource_optimizer.process import Renice, SetAffinity, StopProcess
from sutazai.tasks.hardware_resource_optimizer.quarantine import QuarantineFile
from sutazai.tasks.hardware_resource_optimizer.reading import Metrics, ProcessUsage
from sutazai.tasks.hardware_resource_optimizer.storage import Budget, FileRecord, Walk
from sutazai.testing import NoSystem, context

KIB = 1024
READING = Meter().read("here")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setattr(settings(), "home", path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    path.mkdir()
    return path


def fill(path: Path, size: int, content: bytes = b"x", *, age_days: float = 40) -> Path:
    path.write_bytes(content * size)
    then = time.time() - age_days * 86_400
    os.utime(path, (then, then))
    return path


def records(root: Path) -> list[FileRecord]:
    return list(Walk(root, Budget(60, context())))


@dataclass
class Done:
    """A remedy that was carried out."""

    item: PlanItem
    undo: dict[str, Any]
    gain: Gain


def carry_out(remedy: Remedy, item: PlanItem) -> Done:
    undo = remedy.prepare(item, context(), uuid4())
    return Done(item, undo, remedy.carry_out(item, undo, context()))


# --- quarantine -----------------------------------------------------------------------------


def moves(root: Path, **bounds: Any) -> list[PlanItem]:
    values = {"min_age_days": 30, "retention_days": 7, "limit": 100, "max_bytes": 1 << 30}
    return QuarantineFile().propose(records(root), **{**values, **bounds})


def test_old_files_are_offered_largest_first(tree: Path) -> None:
    fill(tree / "small", 4 * KIB)
    fill(tree / "large", 400 * KIB)
    fill(tree / "young", 900 * KIB, age_days=1)
    assert [Path(item.target).name for item in moves(tree)] == ["large", "small"]
    assert [Path(item.target).name for item in moves(tree, limit=1)] == ["large"]
    assert [Path(item.target).name for item in moves(tree, max_bytes=100 * KIB)] == ["small"]
    assert moves(tree)[0].expected_gain == {
        "disk_bytes": 0,
        "disk_bytes_after_purge": 400 * KIB,
    }


def test_quarantine_moves_on_the_same_file_system_and_frees_nothing(tree: Path) -> None:
    path = fill(tree / "old", 400 * KIB)
    inode = path.stat().st_ino
    done = carry_out(QuarantineFile(), moves(tree)[0])
    entry = Path(done.undo["entry"])
    assert not path.exists()
    assert (entry / "file").stat().st_ino == inode, "renamed, not copied"
    assert done.gain == {"disk_bytes": 0, "quarantined_bytes": 400 * KIB}
    manifest = quarantine.Manifest.model_validate_json((entry / "manifest.json").read_text())
    assert manifest.original.path == str(path)
    kept = manifest.purge_after_at - manifest.quarantined_at
    assert kept.total_seconds() == pytest.approx(7 * 86_400, abs=60)


def test_quarantine_is_restored_with_everything(tree: Path) -> None:
    path = fill(tree / "old", 4 * KIB)
    path.chmod(0o640)
    before = path.stat()
    done = carry_out(QuarantineFile(), moves(tree)[0])
    QuarantineFile().undo(done.undo, context())
    after = path.stat()
    for name in ("st_ino", "st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_nlink"):
        assert getattr(before, name) == getattr(after, name), name
    assert not Path(done.undo["entry"]).exists()
    QuarantineFile().undo(done.undo, context())  # repeating it after a crash is harmless


def test_restoring_never_replaces_what_stands_there_now(tree: Path) -> None:
    path = fill(tree / "old", 4 * KIB)
    done = carry_out(QuarantineFile(), moves(tree)[0])
    path.write_text("new")
    with pytest.raises(InvalidInput, match="Something else"):
        QuarantineFile().undo(done.undo, context())
    assert path.read_text() == "new"
    assert (Path(done.undo["entry"]) / "file").exists()


def test_restoring_makes_the_folder_again_but_follows_no_link(tree: Path, tmp_path: Path) -> None:
    (tree / "deep").mkdir()
    path = fill(tree / "deep" / "old", 4 * KIB)
    done = carry_out(QuarantineFile(), moves(tree)[0])
    path.parent.rmdir()
    path.parent.symlink_to(tmp_path)
    with pytest.raises(InvalidInput, match="symbolic link"):
        QuarantineFile().undo(done.undo, context())
    path.parent.unlink()
    QuarantineFile().undo(done.undo, context())
    assert path.read_bytes() == b"x" * 4 * KIB


def test_purged_file_cannot_be_restored(tree: Path) -> None:
    fill(tree / "old", 400 * KIB)
    done = carry_out(QuarantineFile(), moves(tree)[0])
    entry = Path(done.undo["entry"])
    assert quarantine.held_bytes(entry) == 400 * KIB
    assert quarantine.purge(entry) == 400 * KIB
    assert not entry.exists()
    with pytest.raises(InvalidInput, match="purged"):
        QuarantineFile().undo(done.undo, context())


def test_file_with_further_names_is_not_offered(tree: Path, tmp_path: Path) -> None:
    os.link(fill(tree / "old", 400 * KIB), tmp_path / "elsewhere")
    assert moves(tree) == []


def test_purging_a_file_with_further_names_frees_nothing(tree: Path, tmp_path: Path) -> None:
    fill(tree / "old", 400 * KIB)
    entry = Path(carry_out(QuarantineFile(), moves(tree)[0]).undo["entry"])
    os.link(entry / "file", tmp_path / "elsewhere")
    assert quarantine.purge(entry) == 0


def test_file_that_has_changed_since_the_plan_is_left_alone(tree: Path) -> None:
    path = fill(tree / "old", 4 * KIB)
    item = moves(tree)[0]
    path.write_text("changed")
    with pytest.raises(InvalidInput, match="changed"):
        carry_out(QuarantineFile(), item)
    assert path.read_text() == "changed"


def test_file_whose_folder_became_a_link_is_left_alone(tree: Path, tmp_path: Path) -> None:
    (tree / "deep").mkdir()
    fill(tree / "deep" / "old", 4 * KIB)
    item = moves(tree)[0]
    (tree / "deep").rename(tmp_path / "moved")
    (tree / "deep").symlink_to(tmp_path / "moved")
    with pytest.raises(InvalidInput, match="symbolic link"):
        carry_out(QuarantineFile(), item)
    assert (tmp_path / "moved" / "old").exists()


def test_plan_that_names_a_protected_file_is_refused(tree: Path) -> None:
    fill(tree / "old", 4 * KIB)
    item = moves(tree)[0]
    state = Path("/etc/passwd").stat()
    evidence: dict[str, Any] = dict(item.evidence)
    evidence["file"] = {
        "path": "/etc/passwd",
        "device": state.st_dev,
        "inode": state.st_ino,
        "size_bytes": state.st_size,
        "allocated_bytes": state.st_blocks * 512,
        "modified_ns": state.st_mtime_ns,
    }
    with pytest.raises(InvalidInput, match="protected"):
        carry_out(QuarantineFile(), item.model_copy(update={"evidence": evidence}))


def test_quarantine_is_in_the_home_or_next_to_the_files(
    tree: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quarantine.folder_for(tree / "file") == home / "quarantine"
    monkeypatch.setattr(settings(), "home", Path("/dev/shm"))
    found = quarantine.folder_for(tree / "file")
    assert found.name == f".sutazai-quarantine-{os.getuid()}"
    assert found.parent.stat().st_dev == tree.stat().st_dev
    assert found.parent in tree.parents


def test_quarantine_laid_out_by_somebody_else_is_refused(
    tree: Path, home: Path, tmp_path: Path
) -> None:
    fill(tree / "old", 4 * KIB)
    (home / "quarantine").symlink_to(tmp_path)
    with pytest.raises(InvalidInput, match="not a folder of our own"):
        carry_out(QuarantineFile(), moves(tree)[0])
    assert (tree / "old").exists()


# --- duplicates -----------------------------------------------------------------------------


def links(root: Path, **bounds: Any) -> list[PlanItem]:
    groups = duplicate.Finder(Budget(60, context())).find(records(root))
    return HardlinkDuplicate().propose(groups, **{"limit": 100, "max_bytes": 1 << 30, **bounds})


def used_blocks(root: Path) -> int:
    """Bytes that the files of a tree take up, each inode once."""
    inodes = {(s.st_dev, s.st_ino): s.st_blocks * 512 for s in map(os.stat, root.rglob("*"))}
    return sum(inodes.values())


def test_linking_frees_exactly_what_it_reports(tree: Path) -> None:
    oldest = fill(tree / "oldest", 400 * KIB, age_days=90)
    copy = fill(tree / "copy", 400 * KIB)
    before = used_blocks(tree)
    (item,) = links(tree)
    assert item.target == str(copy)
    done = carry_out(HardlinkDuplicate(), item)
    assert copy.stat().st_ino == oldest.stat().st_ino
    assert before - used_blocks(tree) == done.gain["disk_bytes"] == 400 * KIB
    again = HardlinkDuplicate().carry_out(item, done.undo, context())
    assert again == done.gain, "repeating it after a crash tells the same"


def test_linking_a_file_that_got_a_further_name_frees_nothing(tree: Path, tmp_path: Path) -> None:
    fill(tree / "oldest", 400 * KIB, age_days=90)
    copy = fill(tree / "copy", 400 * KIB)
    (item,) = links(tree)
    os.link(copy, tmp_path / "elsewhere")
    assert carry_out(HardlinkDuplicate(), item).gain == {"disk_bytes": 0}


def test_linking_is_undone_into_files_of_their_own(tree: Path) -> None:
    oldest = fill(tree / "oldest", 400 * KIB, age_days=90)
    copy = fill(tree / "copy", 400 * KIB)
    before = copy.stat()
    done = carry_out(HardlinkDuplicate(), links(tree)[0])
    HardlinkDuplicate().undo(done.undo, context())
    after = copy.stat()
    assert after.st_ino != oldest.stat().st_ino
    assert copy.read_bytes() == oldest.read_bytes()
    for name in ("st_mode", "st_uid", "st_gid", "st_mtime_ns", "st_nlink"):
        assert getattr(before, name) == getattr(after, name), name
    assert sorted(path.name for path in tree.iterdir()) == ["copy", "oldest"]
    copy.write_text("mine")
    with pytest.raises(InvalidInput, match="replaced"):
        HardlinkDuplicate().undo({**done.undo, "copy_inode": 0}, context())


@pytest.mark.parametrize("change", ["mode", "further name", "content"])
def test_files_that_should_not_share_an_inode_are_left_alone(tree: Path, change: str) -> None:
    fill(tree / "oldest", 40 * KIB, age_days=90)
    copy = fill(tree / "copy", 40 * KIB)
    if change == "mode":
        copy.chmod(0o600)
    elif change == "further name":
        os.link(copy, tree / "same inode")
    else:
        (item,) = links(tree)
        fill(copy, 40 * KIB, b"y")
        with pytest.raises(InvalidInput):
            carry_out(HardlinkDuplicate(), item)
        assert copy.read_bytes() == b"y" * 40 * KIB
    assert links(tree) == []


def test_content_is_compared_at_the_last_moment(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tree / "oldest", 40 * KIB, age_days=90)
    copy = fill(tree / "copy", 40 * KIB)
    (item,) = links(tree)
    fill(copy, 40 * KIB, b"y")  # with the size, and below the time stamp, of before
    state = copy.stat()
    evidence: dict[str, Any] = dict(item.evidence)
    evidence["copy"] = {**evidence["copy"], "modified_ns": state.st_mtime_ns}
    with pytest.raises(InvalidInput, match="not equal"):
        carry_out(HardlinkDuplicate(), item.model_copy(update={"evidence": evidence}))
    assert copy.read_bytes() == b"y" * 40 * KIB


# --- processes ------------------------------------------------------------------------------


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as started:
        assert started.stdout is not None
        started.stdout.readline()
        yield started
        started.kill()


def usage_of(pid: int, **values: Any) -> ProcessUsage:
    found = psutil.Process(pid)
    usage = ProcessUsage(
        pid=pid,
        name=found.name(),
        user=found.username(),
        cpu_percent=0,
        memory_bytes=found.memory_info().rss,
        memory_percent=0,
        nice=found.nice(),
        started_at=found.create_time(),
    )
    return usage.model_copy(update=values)


def reading(*usages: ProcessUsage) -> Metrics:
    return READING.model_copy(update={"top_processes": list(usages)})


@dataclass
class FakeSystem(NoSystem):
    """A system with these workers."""

    views: list[WorkerView] = field(default_factory=list)

    def workers(self) -> list[WorkerView]:
        return self.views


def test_large_process_is_stopped_when_it_is_named(child: subprocess.Popen[bytes]) -> None:
    usage = usage_of(child.pid, memory_percent=40.0)
    (item,) = StopProcess().propose(reading(usage), context())
    assert item.reversible is False
    assert item.evidence["pid"] == child.pid
    held = psutil.Process(child.pid).memory_info().rss
    done = carry_out(StopProcess(), item)
    assert child.wait(5) == -15
    assert done.gain["memory_bytes"] == pytest.approx(held, rel=0.2)
    with pytest.raises(InvalidInput):
        StopProcess().undo(done.undo, context())


def test_pid_that_was_used_again_is_refused(child: subprocess.Popen[bytes]) -> None:
    usage = usage_of(child.pid, memory_percent=40.0)
    (item,) = StopProcess().propose(reading(usage), context())
    evidence = {**item.evidence, "started_at": usage.started_at - 100}
    with pytest.raises(InvalidInput, match="another process"):
        carry_out(StopProcess(), item.model_copy(update={"evidence": evidence}))
    assert child.poll() is None


def test_processes_of_the_system_are_left_alone(child: subprocess.Popen[bytes]) -> None:
    system = FakeSystem([WorkerView("w", "a", "here", child.pid, 1, 0, 0.0, 0)])
    seen = context(host="here", system=system)
    for pid in (child.pid, os.getpid(), os.getppid(), 1):
        usage = usage_of(pid, memory_percent=40.0, cpu_percent=400.0)
        assert StopProcess().propose(reading(usage), seen) == []
        assert Renice().propose(reading(usage), seen, 10) == []
        identity = process.ProcessIdentity(pid=pid, started_at=usage.started_at, name="x")
        with pytest.raises(InvalidInput, match="part of this system"):
            identity.find(seen)
    # A worker with this pid on another host protects nothing here.
    elsewhere = context(host="there", system=system)
    usage = usage_of(child.pid, memory_percent=40.0)
    assert len(StopProcess().propose(reading(usage), elsewhere)) == 1


def test_process_with_our_data_on_its_command_line_is_the_systems(home: Path) -> None:
    code = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, f"{home}/postgresql"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        assert server.pid in process.system_pids(context())
        server.communicate(b"\n")


@pytest.mark.parametrize(
    ("command", "is_ours"),
    [
        (["python", "-m", "sutazai", "up"], True),
        (["/x/.venv/bin/python", "/x/.venv/bin/sutazai", "up"], True),
        (["celery", "-A", "sutazai", "worker"], True),
        (["/home/me/sutazai/.venv/bin/python", "-m", "pytest"], False),
        (["bash"], False),
    ],
)
def test_system_is_told_by_its_command_not_by_a_path(command: list[str], is_ours: bool) -> None:
    assert process._names_system(command) is is_ours


def test_process_of_another_user_is_refused(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = usage_of(child.pid, memory_percent=40.0)
    monkeypatch.setattr(process.os, "getuid", lambda: 54321)
    assert StopProcess().propose(reading(usage), context()) == []
    identity = process.ProcessIdentity(pid=child.pid, started_at=usage.started_at, name="x")
    with pytest.raises(InvalidInput, match="another user"):
        identity.find(context())


def test_renice_and_back(child: subprocess.Popen[bytes]) -> None:
    (item,) = Renice().propose(reading(usage_of(child.pid, cpu_percent=90.0)), context(), 7)
    assert item.expected_gain == {"cpu_percent": 0}, "niceness frees no CPU time"
    done = carry_out(Renice(), item)
    assert psutil.Process(child.pid).nice() == 7
    if item.reversible:
        Renice().undo(done.undo, context())
        assert psutil.Process(child.pid).nice() == 0
    assert Renice().propose(reading(usage_of(child.pid, cpu_percent=9.0)), context(), 7) == []


@pytest.mark.skipif((psutil.cpu_count() or 1) < 2, reason="needs two cores")
def test_affinity_and_back(child: subprocess.Popen[bytes]) -> None:
    cores = psutil.Process(child.pid).cpu_affinity()
    assert cores is not None
    greedy = usage_of(child.pid, cpu_percent=100.0 * len(cores))
    (item,) = SetAffinity().propose(reading(greedy), context())
    assert item.reversible
    done = carry_out(SetAffinity(), item)
    assert psutil.Process(child.pid).cpu_affinity() == cores[1:]
    SetAffinity().undo(done.undo, context())
    assert psutil.Process(child.pid).cpu_affinity() == cores


# --- control group --------------------------------------------------------------------------


def test_reclaiming_is_measured_by_the_groups_own_figure(tmp_path: Path) -> None:
    group = tmp_path / "cgroup"
    group.mkdir()
    (group / "cgroup.controllers").write_text("")
    sources = Sources(group, tmp_path)
    assert ReclaimCgroup().propose(sources, 1 << 30) == [], "there is no memory.reclaim"
    (group / "memory.reclaim").write_text("")
    (group / "memory.stat").write_text("inactive_file 5000\n")
    (group / "memory.current").write_text("9000\n")
    (item,) = ReclaimCgroup().propose(sources, 1 << 30)
    assert item.expected_gain == {"memory_bytes": 5000}
    assert ReclaimCgroup().propose(sources, 3000)[0].expected_gain == {"memory_bytes": 3000}
    done = carry_out(ReclaimCgroup(), item)
    assert (group / "memory.reclaim").read_text() == "5000"
    assert done.gain == {"memory_bytes": 0}, "a kernel that gave nothing back is reported as 0"
