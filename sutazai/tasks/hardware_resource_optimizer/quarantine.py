"""Taking files out of the way: moved into a quarantine with a manifest, restored or purged later.

A quarantine is always on the file's own file system, so a move is a rename and copies nothing;
therefore it frees nothing either, until the file is purged. Each file has a folder named after its
audit row, which holds `manifest.json` and `file`.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from pydantic import AwareDatetime, BaseModel

from sutazai.agent import Context
from sutazai.errors import InvalidInput
from sutazai.settings import settings
from sutazai.tasks.hardware_resource_optimizer import protection
from sutazai.tasks.hardware_resource_optimizer.item import Gain, PlanItem
from sutazai.tasks.hardware_resource_optimizer.storage import (
    QUARANTINE_PREFIX,
    FileIdentity,
    FileRecord,
)

MANIFEST = "manifest.json"
CONTENT = "file"


class Manifest(BaseModel):
    """What lies in one folder of a quarantine, for people and for the day the database is lost."""

    audit_id: UUID
    original: FileIdentity
    mode: int
    uid: int
    gid: int
    quarantined_at: AwareDatetime
    purge_after_at: AwareDatetime


class QuarantineFile:
    """Moves a file into the quarantine of its file system."""

    def propose(
        self,
        records: Iterable[FileRecord],
        *,
        min_age_days: float,
        retention_days: float,
        limit: int,
        max_bytes: int,
    ) -> list[PlanItem]:
        """Offer the files unchanged for so long, the largest first, up to a number and a sum."""
        now_s = time.time()
        old = (record for record in records if record.age_days(now_s) >= min_age_days)
        items: list[PlanItem] = []
        for record in sorted(old, key=lambda record: -record.allocated_bytes):
            if len(items) == limit:
                break
            # The blocks of a file with further names would stay in use even after the purge.
            if record.links > 1 or record.allocated_bytes > max_bytes:
                continue
            max_bytes -= record.allocated_bytes
            items.append(_item(len(items) + 1, record, record.age_days(now_s), retention_days))
        return items

    def prepare(self, item: PlanItem, context: Context, audit_id: UUID) -> dict[str, Any]:  # noqa: ARG002
        """Check that the file is still the plan's, and choose where it goes."""
        identity = FileIdentity.model_validate(item.evidence["file"])
        identity.check()
        retention = timedelta(days=_number(item, "retention_days"))
        return {
            "path": identity.path,
            "inode": identity.inode,
            "entry": str(folder_for(Path(identity.path)) / str(audit_id)),
            "purge_after_unix_s": (datetime.now(UTC) + retention).timestamp(),
        }

    def carry_out(self, item: PlanItem, undo: dict[str, Any], context: Context) -> Gain:  # noqa: ARG002
        """Write the manifest, then rename; nothing is freed, and the gain says so."""
        identity = FileIdentity.model_validate(item.evidence["file"])
        entry = Path(undo["entry"])
        if not (entry / CONTENT).exists():  # else: done before a crash
            _move(identity, entry, datetime.fromtimestamp(undo["purge_after_unix_s"], UTC))
        moved = (entry / CONTENT).lstat()
        # The same inode under another name holds the same blocks: measured, not assumed.
        freed = identity.allocated_bytes - moved.st_blocks * 512
        return {"disk_bytes": freed, "quarantined_bytes": moved.st_blocks * 512}

    def undo(self, undo: dict[str, Any], context: Context) -> None:  # noqa: ARG002
        """Move the file back to where it was, unless something else is there now."""
        restore(Path(undo["entry"]), Path(undo["path"]))


def folder_for(path: Path) -> Path:
    """Return the quarantine on a file's own file system, to which a rename is possible.

    That is `$SUTAZAI_HOME/quarantine` where the home is on it, else a folder of our own in the
    topmost writable folder above the file that is on it.
    """
    # By mount points, not devices: between two mounts of one device a rename is refused too.
    mounts = {Path(partition.mountpoint) for partition in psutil.disk_partitions(all=True)}
    home = settings().home
    if home.is_dir() and _mount_of(home, mounts) == _mount_of(path, mounts):
        return home / "quarantine"
    top = path.parent
    while top not in mounts and os.access(top.parent, os.W_OK | os.X_OK):
        top = top.parent
    return top / f"{QUARANTINE_PREFIX}-{os.getuid()}"


def _mount_of(path: Path, mounts: set[Path]) -> Path:
    return next((parent for parent in path.parents if parent in mounts), Path("/"))


def restore(entry: Path, path: Path) -> None:
    """Move a quarantined file back; raises `InvalidInput` when its place is taken or it is gone."""
    content = entry / CONTENT
    if not os.path.lexists(content):
        if os.path.lexists(path) and (entry / MANIFEST).exists():
            _remove(entry)  # never moved, or moved back before a crash
            return
        if os.path.lexists(path) and not entry.exists():
            return
        raise InvalidInput(f"{path} is no longer in quarantine; it has been purged.")
    if Path(os.path.realpath(path.parent)) != path.parent:
        raise InvalidInput(f"{path.parent} leads through a symbolic link now.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with protection.held_folder(path) as folder:
        if os.path.lexists(path) and path.lstat().st_ino == content.lstat().st_ino:
            _remove(entry)  # a crash came between the link and this
            return
        try:
            # Unlike a rename, a link never replaces what stands there.
            os.link(content, path.name, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            raise InvalidInput(f"Something else is at {path} now; move it away first.") from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            _rename_onto_nothing(content, path.name, folder)
    _remove(entry)


def held_bytes(entry: Path) -> int:
    """Return what deleting a quarantined file would free: nothing while it has other names."""
    try:
        state = (entry / CONTENT).lstat()
    except FileNotFoundError:
        return 0
    return state.st_blocks * 512 if state.st_nlink == 1 else 0


def purge(entry: Path) -> int:
    """Delete a quarantined file for good; return the bytes that freed."""
    freed = held_bytes(entry)
    _remove(entry)
    return freed


def _item(number: int, record: FileRecord, age_days: float, retention_days: float) -> PlanItem:
    return PlanItem(
        id=f"quarantine_file-{number}",
        kind="quarantine_file",
        target=record.path,
        expected_gain={"disk_bytes": 0, "disk_bytes_after_purge": record.allocated_bytes},
        risk="medium",
        reversible=True,
        evidence={
            "file": FileIdentity.of(record).model_dump(),
            "age_days": round(age_days, 2),
            "retention_days": retention_days,
        },
    )


def _number(item: PlanItem, name: str) -> float:
    value = item.evidence[name]
    if not isinstance(value, int | float):
        raise InvalidInput(f"The plan's item {item.id} has no number {name}.")
    return float(value)


def _move(identity: FileIdentity, entry: Path, purge_after_at: datetime) -> None:
    path = Path(identity.path)
    _make_private(entry)
    with protection.held_folder(path) as folder:
        now = identity.check()
        manifest = Manifest(
            audit_id=UUID(entry.name),
            original=identity,
            mode=stat.S_IMODE(now.st_mode),
            uid=now.st_uid,
            gid=now.st_gid,
            quarantined_at=datetime.now(UTC),
            purge_after_at=purge_after_at,
        )
        # First the manifest, on disk: a file without one could not be put back by hand.
        with (entry / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(manifest.model_dump_json(indent=2))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.rename(path.name, entry / CONTENT, src_dir_fd=folder)
        except OSError:
            _remove(entry)
            raise


def _make_private(entry: Path) -> None:
    """Make a folder of the quarantine; refuse one that somebody else has laid out for us."""
    quarantine = entry.parent
    quarantine.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = quarantine.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
        raise InvalidInput(f"{quarantine} is not a folder of our own; nothing is moved there.")
    entry.mkdir(mode=0o700, exist_ok=True)


def _rename_onto_nothing(content: Path, name: str, folder: int) -> None:
    """Rename on a file system without hard links; the check before it is all there can be."""
    with suppress(FileNotFoundError):
        os.stat(name, dir_fd=folder, follow_symlinks=False)
        raise InvalidInput(f"Something else is at {name} now; move it away first.")
    os.rename(content, name, dst_dir_fd=folder)


def _remove(entry: Path) -> None:
    for name in (CONTENT, MANIFEST):
        (entry / name).unlink(missing_ok=True)
    with suppress(OSError):
        entry.rmdir()
