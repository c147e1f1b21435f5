"""Files of equal content: finding them, and letting them share one inode.

Candidates are narrowed by size, then by a hash of the first 64 KiB, then by a hash of the whole.
Names of one inode are one file and no duplicates.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from pydantic import BaseModel, Field

from sutazai.agent import Context
from sutazai.errors import InvalidInput
from sutazai.tasks.hardware_resource_optimizer import protection
from sutazai.tasks.hardware_resource_optimizer.item import Gain, PlanItem
from sutazai.tasks.hardware_resource_optimizer.measurement import printable
from sutazai.tasks.hardware_resource_optimizer.storage import (
    Budget,
    FileIdentity,
    FileRecord,
    ScanParams,
    Walk,
)

HEAD_BYTES = 64 * 1024
_BLOCK_BYTES = 1 << 20
_PATHS_TOLD = 100


class DuplicateGroup(BaseModel):
    """Files of equal content."""

    size_bytes: int
    content_hash: str = Field(description="BLAKE2b of the content.")
    paths: list[str] = Field(description=f"At most {_PATHS_TOLD}.")
    copies: int
    wasted_bytes: int = Field(description="What all copies but one take up on disk.")


class Duplicates(BaseModel):
    """Groups of equal files, the most wasteful first."""

    path: str
    groups: list[DuplicateGroup]
    groups_found: int
    wasted_bytes: int = Field(description="Of all groups found, also those beyond the limit.")
    files_seen: int
    unreadable: int
    truncated: bool


class Group(NamedTuple):
    """Files of equal content, and the hash of that."""

    content_hash: str
    files: list[FileRecord]

    @property
    def wasted_bytes(self) -> int:
        """What all files but one take up."""
        return sum(sorted(file.allocated_bytes for file in self.files)[:-1])


def find(params: ScanParams, context: Context) -> Duplicates:
    """Find equal files below a folder."""
    root = protection.check_readable(params.path)
    budget = Budget(params.budget_s, context)
    walk = Walk(root, budget)
    wanted = [record for record in walk if record.size_bytes >= max(1, params.min_size_bytes)]
    finder = Finder(budget)
    groups = finder.find(wanted)
    return Duplicates(
        path=printable(str(root)),
        groups=[
            DuplicateGroup(
                size_bytes=group.files[0].size_bytes,
                content_hash=group.content_hash,
                paths=[printable(file.path) for file in group.files[:_PATHS_TOLD]],
                copies=len(group.files),
                wasted_bytes=group.wasted_bytes,
            )
            for group in groups[: params.limit]
        ],
        groups_found=len(groups),
        wasted_bytes=sum(group.wasted_bytes for group in groups),
        files_seen=walk.files,
        unreadable=walk.unreadable + finder.unreadable,
        truncated=budget.truncated,
    )


class Finder:
    """Groups files by content, the largest first, so that a short budget finds what matters."""

    def __init__(self, budget: Budget) -> None:
        self.unreadable = 0
        self._budget = budget
        self._hashed = 0

    def find(self, records: Iterable[FileRecord]) -> list[Group]:
        """Return groups of equal files, the most wasteful first."""
        found = []
        same_size = _repeated(records, lambda record: record.size_bytes)
        for files in sorted(same_size, key=lambda files: -files[0].size_bytes):
            heads = {file: digest for file in files if (digest := self._hash(file, HEAD_BYTES))}
            for alike in _repeated(heads, heads.__getitem__):
                found += self._by_content(alike, heads)
        return sorted(found, key=lambda group: -group.wasted_bytes)

    def _by_content(self, files: list[FileRecord], heads: dict[FileRecord, str]) -> list[Group]:
        if files[0].size_bytes <= HEAD_BYTES:
            whole = {file: heads[file] for file in files}
        else:
            whole = {file: digest for file in files if (digest := self._hash(file, None))}
        return [Group(whole[same[0]], same) for same in _repeated(whole, whole.__getitem__)]

    def _hash(self, record: FileRecord, limit: int | None) -> str | None:
        """Return the hash of a file or of its head; None when it cannot be read or time is up."""
        digest = hashlib.blake2b(digest_size=32)
        remaining = record.size_bytes if limit is None else min(limit, record.size_bytes)
        try:
            descriptor = _open_unnoticed(record.path)
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                while remaining > 0:
                    if self._budget.is_spent(lambda: f"compared {self._hashed} files"):
                        return None
                    block = file.read(min(_BLOCK_BYTES, remaining))
                    if not block:
                        return None  # it shrank meanwhile
                    digest.update(block)
                    remaining -= len(block)
        except OSError:
            self.unreadable += 1
            return None
        self._hashed += 1
        return digest.hexdigest()


class HardlinkDuplicate:
    """Replaces a file by another name of an equal one, which frees its blocks at once.

    Only between files of one owner, group and mode. Whoever afterwards writes into one of the
    names in place writes into both.
    """

    def propose(self, groups: Iterable[Group], limit: int, max_bytes: int) -> list[PlanItem]:
        """Offer each copy but the oldest, the largest first, up to a number and a sum of bytes."""
        items: list[PlanItem] = []
        for group in groups:
            for alike in _repeated(group.files, lambda f: (f.device, f.uid, f.gid, f.mode)):
                keep, *copies = sorted(alike, key=lambda file: file.modified_ns)
                for copy in copies:
                    # The blocks of a file with further names would stay in use.
                    if copy.links > 1 or copy.allocated_bytes > max_bytes:
                        continue
                    if len(items) == limit:
                        return items
                    max_bytes -= copy.allocated_bytes
                    items.append(_link_item(len(items) + 1, group, keep, copy))
        return items

    def prepare(self, item: PlanItem, context: Context, audit_id: UUID) -> dict[str, Any]:  # noqa: ARG002
        """Check that both files are still those of the plan, and note the copy's own attributes."""
        keep, copy = _pair(item)
        roots = protection.protected_roots()
        now = copy.check(roots)
        kept = keep.check(roots)
        if (now.st_dev, now.st_uid, now.st_gid, now.st_mode) != (
            kept.st_dev,
            kept.st_uid,
            kept.st_gid,
            kept.st_mode,
        ):
            raise InvalidInput(f"{copy.path} and {keep.path} differ in owner, mode or device.")
        return {
            "path": copy.path,
            "keep": keep.path,
            "inode": keep.inode,
            "copy_inode": copy.inode,
            "modified_ns": copy.modified_ns,
            "temporary": f".{audit_id}.link",
        }

    def carry_out(self, item: PlanItem, undo: dict[str, Any], context: Context) -> Gain:  # noqa: ARG002
        """Compare byte by byte, then replace in one step; the gain is what the old inode freed."""
        keep, copy = _pair(item)
        path = Path(copy.path)
        with (
            protection.held_folder(path) as folder,
            protection.held_folder(Path(keep.path)) as source,
        ):
            if os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_ino == keep.inode:
                return {"disk_bytes": copy.allocated_bytes}  # done before a crash
            old = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
            try:
                if not _equal(keep, copy):
                    raise InvalidInput(f"{copy.path} and {keep.path} are not equal any more.")
                keep.check()
                copy.check()
                before = os.fstat(old).st_blocks * 512
                with suppress(FileNotFoundError):
                    os.unlink(undo["temporary"], dir_fd=folder)
                os.link(
                    Path(keep.path).name,
                    undo["temporary"],
                    src_dir_fd=source,
                    dst_dir_fd=folder,
                    follow_symlinks=False,
                )
                os.replace(undo["temporary"], path.name, src_dir_fd=folder, dst_dir_fd=folder)
                after = os.fstat(old)
                return {"disk_bytes": before - (after.st_blocks * 512 if after.st_nlink else 0)}
            finally:
                os.close(old)

    def undo(self, undo: dict[str, Any], context: Context) -> None:  # noqa: ARG002
        """Give the file an inode of its own again, with the content both names have now."""
        path = Path(undo["path"])
        with protection.held_folder(path) as folder:
            try:
                now = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                raise InvalidInput(f"{path} is gone; there is nothing to restore.") from None
            if now.st_ino == undo["copy_inode"]:
                return  # it was never replaced
            if now.st_ino != undo["inode"]:
                raise InvalidInput(f"{path} has been replaced by another file since.")
            with suppress(FileNotFoundError):
                os.unlink(undo["temporary"], dir_fd=folder)
            descriptor = os.open(
                undo["temporary"], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder
            )
            source = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
            with os.fdopen(source, "rb") as reader, os.fdopen(descriptor, "wb") as writer:
                shutil.copyfileobj(reader, writer, _BLOCK_BYTES)
                writer.flush()
                os.fchown(writer.fileno(), now.st_uid, now.st_gid)
                os.fchmod(writer.fileno(), stat.S_IMODE(now.st_mode))
                os.utime(writer.fileno(), ns=(now.st_atime_ns, undo["modified_ns"]))
                os.fsync(writer.fileno())
            os.replace(undo["temporary"], path.name, src_dir_fd=folder, dst_dir_fd=folder)


def _link_item(number: int, group: Group, keep: FileRecord, copy: FileRecord) -> PlanItem:
    return PlanItem(
        id=f"hardlink_duplicate-{number}",
        kind="hardlink_duplicate",
        target=copy.path,
        expected_gain={"disk_bytes": copy.allocated_bytes},
        risk="medium",
        reversible=True,
        evidence={
            "keep": FileIdentity.of(keep).model_dump(),
            "copy": FileIdentity.of(copy).model_dump(),
            "content_hash": group.content_hash,
        },
    )


def _pair(item: PlanItem) -> tuple[FileIdentity, FileIdentity]:
    return (
        FileIdentity.model_validate(item.evidence["keep"]),
        FileIdentity.model_validate(item.evidence["copy"]),
    )


def _equal(one: FileIdentity, other: FileIdentity) -> bool:
    with (
        os.fdopen(_open_unnoticed(one.path), "rb", buffering=0) as first,
        os.fdopen(_open_unnoticed(other.path), "rb", buffering=0) as second,
    ):
        while block := first.read(_BLOCK_BYTES):
            if block != second.read(len(block)):
                return False
        return not second.read(1)


def _open_unnoticed(path: str) -> int:
    """Open a file for reading without changing its access time, where that is allowed."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags | getattr(os, "O_NOATIME", 0))
    except PermissionError:
        return os.open(path, flags)  # O_NOATIME is for a file's owner only


def _repeated(
    records: Iterable[FileRecord], key: Callable[[FileRecord], Hashable]
) -> list[list[FileRecord]]:
    """Return the groups of two and more that agree in a key."""
    groups: defaultdict[Hashable, list[FileRecord]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return [group for group in groups.values() if len(group) > 1]
