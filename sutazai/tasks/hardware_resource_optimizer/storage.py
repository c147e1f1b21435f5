"""Looking at files: what fills a folder, and which files are large. Nothing is changed here."""

from __future__ import annotations

import heapq
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field

from sutazai.agent import Context
from sutazai.errors import InvalidInput
from sutazai.tasks.hardware_resource_optimizer import protection
from sutazai.tasks.hardware_resource_optimizer.measurement import printable

LONGEST_BUDGET_S = 300
QUARANTINE_PREFIX = ".sutazai-quarantine"
_DAY_S = 86_400
_AGES = (
    (7, "under 7 days"),
    (30, "7 to 30 days"),
    (180, "30 to 180 days"),
    (365, "180 to 365 days"),
)


class ScanParams(BaseModel):
    """Where to look, for how long, and how much to tell."""

    path: str = Field(max_length=4096, description="The folder to look at, as an absolute path.")
    min_size_bytes: int = Field(default=1, ge=0, description="Smaller files are left out.")
    limit: int = Field(default=50, ge=1, le=500, description="The most entries of each list.")
    budget_s: float = Field(
        default=60.0,
        gt=0,
        le=LONGEST_BUDGET_S,
        description="The scan stops after this long and says `truncated`.",
    )


class FileRecord(NamedTuple):
    """One regular file, as `lstat` tells it."""

    path: str
    size_bytes: int
    allocated_bytes: int
    device: int
    inode: int
    links: int
    modified_ns: int
    uid: int
    gid: int
    mode: int

    @property
    def is_printable(self) -> bool:
        """Whether the path can be written as JSON and found again by it."""
        return printable(self.path) == self.path

    def age_days(self, now_s: float) -> float:
        """How long ago its content was changed."""
        return (now_s - self.modified_ns / 1e9) / _DAY_S


class FileIdentity(BaseModel):
    """What a file was when the plan was made; it must still be that when it is carried out."""

    path: str
    device: int
    inode: int
    size_bytes: int
    allocated_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, record: FileRecord) -> FileIdentity:
        """Take it from a scan."""
        return cls(**{name: getattr(record, name) for name in cls.model_fields})

    def check(self, roots: frozenset[Path] | None = None) -> os.stat_result:
        """Return the file's state; raises `InvalidInput` when it is not this file any more."""
        path = protection.check(self.path, roots)
        now = path.lstat()
        same = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) == (
            self.device,
            self.inode,
            self.size_bytes,
            self.modified_ns,
        )
        if not same or not stat.S_ISREG(now.st_mode):
            raise InvalidInput(f"{self.path} has changed since the plan was made.")
        return now


class FileSize(BaseModel):
    """A large file."""

    path: str
    size_bytes: int
    allocated_bytes: int = Field(description="What it takes up on disk.")
    age_days: float = Field(description="Since its content was changed.")


class FolderSize(BaseModel):
    """What a folder takes up with everything below it."""

    path: str
    allocated_bytes: int


class Share(BaseModel):
    """How much a part of the files takes up."""

    name: str
    files: int
    allocated_bytes: int


class StorageReport(BaseModel):
    """What fills a folder. A file with several names is counted once."""

    path: str
    files: int
    folders: int
    size_bytes: int
    allocated_bytes: int
    largest_folders: list[FolderSize]
    largest_files: list[FileSize]
    by_extension: list[Share]
    by_age: list[Share]
    unreadable: int = Field(description="Folders and files that could not be read.")
    truncated: bool = Field(description="Whether the budget ended before everything was seen.")
    scan_seconds: float


class LargeFiles(BaseModel):
    """The largest files under a folder."""

    path: str
    large_files: list[FileSize]
    files_seen: int
    unreadable: int
    truncated: bool


class Budget:
    """The time a scan may take; it also looks for cancellation and tells the progress."""

    def __init__(
        self, seconds: float, context: Context, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.truncated = False
        self._clock = clock
        self._context = context
        self._seconds = seconds
        self._started_at = clock()
        self._next_look_at = self._started_at

    @property
    def spent_s(self) -> float:
        """How long it has taken so far."""
        return self._clock() - self._started_at

    def is_spent(self, message: Callable[[], str]) -> bool:
        """Whether to stop now; looks for cancellation and tells the progress twice a second."""
        now = self._clock()
        if now - self._started_at >= self._seconds:
            self.truncated = True
        elif now >= self._next_look_at:
            self._next_look_at = now + 0.5
            self._context.progress(min(0.99, self.spent_s / self._seconds), message())
            self.truncated = self.truncated or self._context.cancelled
        return self.truncated


class Walk:
    """Every regular file below a folder, on its own file system, without following links."""

    def __init__(
        self,
        root: Path,
        budget: Budget,
        *,
        skipped: frozenset[Path] = frozenset(),
        skipped_prefix: str | None = None,
    ) -> None:
        self.root = root
        self.files = 0
        self.folders = 0
        self.unreadable = 0
        self._budget = budget
        self._skipped = {str(path) for path in skipped}
        self._skipped_prefix = skipped_prefix
        self._several_names: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[FileRecord]:
        """Yield each file once, by one of its names, until the budget is spent."""
        device = self.root.stat().st_dev
        waiting = [str(self.root)]
        while waiting:
            folder = waiting.pop()
            self.folders += 1
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if self._budget.is_spent(self._message):
                            return
                        if record := self._look(entry, device, waiting):
                            yield record
            except OSError:
                self.unreadable += 1

    def _look(self, entry: os.DirEntry[str], device: int, waiting: list[str]) -> FileRecord | None:
        try:
            state = entry.stat(follow_symlinks=False)
            is_folder = entry.is_dir(follow_symlinks=False)
            is_file = entry.is_file(follow_symlinks=False)
        except OSError:
            self.unreadable += 1
            return None
        if state.st_dev != device:
            return None
        if is_folder:
            if not self._is_skipped(entry):
                waiting.append(entry.path)
            return None
        if not is_file or self._is_seen(state):
            return None
        self.files += 1
        return FileRecord(
            entry.path,
            state.st_size,
            state.st_blocks * 512,
            state.st_dev,
            state.st_ino,
            state.st_nlink,
            state.st_mtime_ns,
            state.st_uid,
            state.st_gid,
            state.st_mode,
        )

    def _is_skipped(self, entry: os.DirEntry[str]) -> bool:
        prefix = self._skipped_prefix
        return entry.path in self._skipped or bool(prefix and entry.name.startswith(prefix))

    def _is_seen(self, state: os.stat_result) -> bool:
        if state.st_nlink == 1:
            return False
        key = (state.st_dev, state.st_ino)
        if key in self._several_names:
            return True
        self._several_names.add(key)
        return False

    def _message(self) -> str:
        return f"{self.files} files in {self.folders} folders"


class _Tally:
    """How many files, and how much they take up, by some name."""

    def __init__(self) -> None:
        self.allocated_bytes: Counter[str] = Counter()
        self.files: Counter[str] = Counter()

    def add(self, name: str, record: FileRecord) -> None:
        """Count a file under a name."""
        self.allocated_bytes[name] += record.allocated_bytes
        self.files[name] += 1

    def shares(self, limit: int) -> list[Share]:
        """Return the names that take up most."""
        return [
            Share(name=printable(name), files=self.files[name], allocated_bytes=amount)
            for name, amount in self.allocated_bytes.most_common(limit)
        ]


def analyze(params: ScanParams, context: Context) -> StorageReport:
    """Add up what fills a folder: by folder, by file, by extension and by age."""
    root = protection.check_readable(params.path)
    budget = Budget(params.budget_s, context)
    walk = Walk(root, budget)
    now_s = time.time()
    folders, extensions, ages = _Tally(), _Tally(), _Tally()
    largest: list[tuple[int, FileRecord]] = []
    size = 0
    for record in walk:
        if record.size_bytes < params.min_size_bytes:
            continue
        size += record.size_bytes
        folder, name = os.path.split(record.path)
        folders.add(folder, record)
        extensions.add(_extension(name), record)
        ages.add(_age_name(record.age_days(now_s)), record)
        _keep_largest(largest, record, params.limit)
    return StorageReport(
        path=printable(str(root)),
        files=folders.files.total(),
        folders=walk.folders,
        size_bytes=size,
        allocated_bytes=folders.allocated_bytes.total(),
        largest_folders=[
            FolderSize(path=printable(path), allocated_bytes=total)
            for path, total in _with_descendants(folders.allocated_bytes, root).most_common(
                params.limit
            )
        ],
        largest_files=_sizes(largest, now_s),
        by_extension=extensions.shares(params.limit),
        by_age=ages.shares(params.limit),
        unreadable=walk.unreadable,
        truncated=budget.truncated,
        scan_seconds=round(budget.spent_s, 3),
    )


def find_large(params: ScanParams, context: Context) -> LargeFiles:
    """Return the largest files, largest first."""
    root = protection.check_readable(params.path)
    budget = Budget(params.budget_s, context)
    walk = Walk(root, budget)
    largest: list[tuple[int, FileRecord]] = []
    for record in walk:
        if record.size_bytes >= params.min_size_bytes:
            _keep_largest(largest, record, params.limit)
    return LargeFiles(
        path=printable(str(root)),
        large_files=_sizes(largest, time.time()),
        files_seen=walk.files,
        unreadable=walk.unreadable,
        truncated=budget.truncated,
    )


def _keep_largest(largest: list[tuple[int, FileRecord]], record: FileRecord, limit: int) -> None:
    if len(largest) < limit:
        heapq.heappush(largest, (record.size_bytes, record))
    elif record.size_bytes > largest[0][0]:
        heapq.heapreplace(largest, (record.size_bytes, record))


def _sizes(largest: list[tuple[int, FileRecord]], now_s: float) -> list[FileSize]:
    return [
        FileSize(
            path=printable(record.path),
            size_bytes=record.size_bytes,
            allocated_bytes=record.allocated_bytes,
            age_days=round(record.age_days(now_s), 2),
        )
        for _, record in sorted(largest, reverse=True)
    ]


def _with_descendants(own: Counter[str], root: Path) -> Counter[str]:
    """Add to every folder what lies below it, up to the root."""
    totals: Counter[str] = Counter()
    for folder, amount in own.items():
        path = Path(folder)
        for level in (path, *path.parents):
            totals[str(level)] += amount
            if level == root:
                break
    return totals


def _extension(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f".{last}".lower()[:16] if stem else "(none)"


def _age_name(days: float) -> str:
    return next((name for bound, name in _AGES if days < bound), "over a year")
