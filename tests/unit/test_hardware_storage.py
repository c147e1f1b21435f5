"""Looking at files: sizes, duplicates, budgets, and what must never be touched."""

from __future__ import annotations

import os
import pwd
import time
from pathlib import Path

import pytest

from sutazai.errors import InvalidInput
from sutazai.settings import settings
from sutazai.tasks.hardware_resource_optimizer import (
    analyze_storage,
    duplicate,
    find_duplicates,
    find_large_files,
    protection,
    storage,
)
from sutazai.tasks.hardware_resource_optimizer.storage import Budget, Walk
from sutazai.testing import RecordedContext, context

KIB = 1024


def fill(path: Path, size: int, *, head: bytes = b"", age_days: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + b"x" * (size - len(head)))
    then = time.time() - age_days * 86_400
    os.utime(path, (then, then))
    return path


def analyze(
    path: Path, seen: RecordedContext | None = None, **params: object
) -> storage.StorageReport:
    result = analyze_storage(
        analyze_storage.parse({"path": str(path), **params}), seen or context()
    )
    assert isinstance(result, storage.StorageReport)
    assert analyze_storage.dump(result)
    return result


def duplicates(
    path: Path, seen: RecordedContext | None = None, **params: object
) -> duplicate.Duplicates:
    result = find_duplicates(
        find_duplicates.parse({"path": str(path), **params}), seen or context()
    )
    assert isinstance(result, duplicate.Duplicates)
    assert find_duplicates.dump(result)
    return result


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    fill(root / "a" / "big.log", 300 * KIB, age_days=400)
    fill(root / "a" / "deep" / "mid.log", 100 * KIB, age_days=10)
    fill(root / "b" / "small.txt", 4 * KIB)
    os.link(root / "a" / "big.log", root / "b" / "second-name.log")
    (root / "b" / "link").symlink_to(root / "a")
    fill(tmp_path / "outside.bin", 900 * KIB)
    (root / "escape").symlink_to(tmp_path)
    return root


def test_report_counts_every_file_once(tree: Path) -> None:
    report = analyze(tree)
    assert (report.files, report.folders) == (3, 4)
    assert report.size_bytes == 404 * KIB
    assert report.truncated is False
    folders = {folder.path: folder.allocated_bytes for folder in report.largest_folders}
    assert folders[str(tree)] == report.allocated_bytes >= 404 * KIB
    assert folders[str(tree / "a" / "deep")] == 100 * KIB
    extensions = {share.name: share.files for share in report.by_extension}
    assert extensions == {".log": 2, ".txt": 1}
    ages = {share.name: share.files for share in report.by_age}
    assert ages == {"over a year": 1, "7 to 30 days": 1, "under 7 days": 1}


def test_large_files_come_largest_first_and_stay_inside(tree: Path) -> None:
    result = find_large_files(
        find_large_files.parse({"path": str(tree), "min_size_bytes": 50 * KIB, "limit": 1}),
        context(),
    )
    assert isinstance(result, storage.LargeFiles)
    assert [file.size_bytes for file in result.large_files] == [300 * KIB]
    assert result.large_files[0].age_days == pytest.approx(400, abs=0.01)
    assert result.files_seen == 3


def test_names_that_are_not_text_can_be_reported(tmp_path: Path) -> None:
    fill(tmp_path / os.fsdecode(b"caf\xe9.bin"), KIB)
    assert analyze(tmp_path).largest_files[0].path.endswith("caf\\xe9.bin")


def test_duplicates_are_equal_in_every_byte(tmp_path: Path) -> None:
    size = duplicate.HEAD_BYTES + 10 * KIB
    first = fill(tmp_path / "one", size)
    fill(tmp_path / "deep" / "same", size)
    fill(tmp_path / "differs-at-the-start", size, head=b"!")
    late = fill(tmp_path / "differs-at-the-end", size)
    with late.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.link(first, tmp_path / "another-name")
    fill(tmp_path / "empty", 0)
    fill(tmp_path / "empty-too", 0)
    found = duplicates(tmp_path)
    assert len(found.groups) == found.groups_found == 1
    group = found.groups[0]
    assert group.copies == 2
    assert group.size_bytes == size
    assert group.wasted_bytes == found.wasted_bytes == first.stat().st_blocks * 512
    assert str(tmp_path / "deep" / "same") in group.paths
    # Of the two names of one inode only one is told.
    assert len({str(tmp_path / "one"), str(tmp_path / "another-name")} & set(group.paths)) == 1


def test_most_wasteful_group_comes_first(tmp_path: Path) -> None:
    for number in range(2):
        fill(tmp_path / f"large-{number}", 200 * KIB)
    for number in range(10):
        fill(tmp_path / f"small-{number}", 8 * KIB)
    found = duplicates(tmp_path, limit=1)
    assert [group.size_bytes for group in found.groups] == [200 * KIB]
    assert found.groups_found == 2


def test_only_the_heads_of_different_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        fill(tmp_path / str(number), 4 << 20, head=str(number).encode())
    hashed: list[int | None] = []
    original = duplicate.Finder._hash

    def count(self: duplicate.Finder, record: storage.FileRecord, limit: int | None) -> str | None:
        hashed.append(limit)
        return original(self, record, limit)

    monkeypatch.setattr(duplicate.Finder, "_hash", count)
    assert duplicates(tmp_path).groups == []
    assert hashed == [duplicate.HEAD_BYTES] * 3


class Clock:
    """A second passes at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_budget_ends_a_scan_and_says_so(tree: Path) -> None:
    seen = context()
    budget = Budget(3, seen, clock=Clock())
    found = list(Walk(tree, budget))
    assert budget.truncated
    assert len(found) < 3
    assert analyze(tree, budget_s=1e-9).truncated


def test_cancelled_scan_stops(tree: Path) -> None:
    report = analyze(tree, context(cancelled=True))
    assert report.truncated
    assert report.files == 0


def test_scan_tells_its_progress(tree: Path) -> None:
    seen = context()
    analyze(tree, seen)
    assert seen.progressed
    assert all(0 <= fraction <= 1 for fraction, _ in seen.progressed)


def test_scanned_file_keeps_its_access_time(tmp_path: Path) -> None:
    path = fill(tmp_path / "one", KIB, age_days=40)
    fill(tmp_path / "two", KIB, age_days=40)
    before = path.stat().st_atime_ns
    assert duplicates(tmp_path).groups
    assert path.stat().st_atime_ns == before


@pytest.mark.parametrize("path", ["relative", "/no/such/folder", "/proc", "/sys/kernel", "/dev"])
def test_what_cannot_be_looked_at_is_refused(path: str) -> None:
    with pytest.raises(InvalidInput):
        analyze(Path(path))


# --- protection -----------------------------------------------------------------------------

LISTED = ["/etc", "/boot", "/usr", "/bin", "/sbin", "/lib", "/proc", "/sys", "/dev"]


@pytest.mark.parametrize("path", ["/", *LISTED, "/etc/passwd", "/usr/bin/env", "/usr/../etc"])
def test_protected_roots_are_refused(path: str) -> None:
    with pytest.raises(InvalidInput, match="protected"):
        protection.check(path)


def test_home_documents_and_our_own_data_are_protected() -> None:
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    roots = protection.protected_roots()
    assert protection.is_protected(home / "Documents" / "thesis.odt", roots)
    assert protection.is_protected(home / ".ssh" / "id_ed25519", roots)
    assert protection.is_protected(settings().home / "postgresql" / "base", roots)
    assert protection.is_protected(Path(protection.__file__), roots)


def test_symbolic_links_are_refused(tmp_path: Path) -> None:
    real = tmp_path / "real"
    fill(real / "file", KIB)
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "to-etc").symlink_to("/etc")
    assert protection.check(str(real / "file")) == real / "file"
    with pytest.raises(InvalidInput, match="symbolic link"):
        protection.check(str(tmp_path / "link" / "file"))
    with pytest.raises(InvalidInput, match="protected"):
        protection.check(str(tmp_path / "to-etc" / "hosts"))


@pytest.mark.parametrize("path", ["some/file", "/tmp/sutazai/no/such/file"])
def test_odd_paths_are_refused(path: str) -> None:
    with pytest.raises(InvalidInput):
        protection.check(path)


def test_folder_swapped_for_a_link_is_noticed(tmp_path: Path) -> None:
    path = fill(tmp_path / "folder" / "file", KIB)
    with protection.held_folder(path) as descriptor:
        assert os.stat("file", dir_fd=descriptor).st_size == KIB
    (tmp_path / "link").symlink_to(tmp_path)
    higher_up = tmp_path / "link" / "folder" / "file"
    with pytest.raises(InvalidInput, match="symbolic link"), protection.held_folder(higher_up):
        pytest.fail("the link was followed")
    path.parent.rename(tmp_path / "moved")
    (tmp_path / "folder").symlink_to(tmp_path / "moved")
    with pytest.raises(InvalidInput), protection.held_folder(path):
        pytest.fail("the link was followed")
    (tmp_path / "folder").unlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "deep").symlink_to("/etc")
    with pytest.raises(InvalidInput), protection.held_folder(tmp_path / "folder" / "deep" / "x"):
        pytest.fail("the link was followed")
