"""Small disks in memory that can be filled."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_BLOCK_BYTES = 4096


def mount(folder: Path, size: str) -> None:
    """Mount an empty disk; raises `CalledProcessError` without the right to."""
    # Others may pass through, because PostgreSQL runs as another user than root.
    options = f"size={size},mode=0711"
    command = ["mount", "-t", "tmpfs", "-o", options, "sutazai-fault", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=10)


def unmount(folder: Path) -> None:
    """Unmount it, at once or when its last user has gone."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True, timeout=10)


@cache
def missing_mount() -> str:
    """Say whether this user may not mount."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount(Path(folder), "1m")
        except (OSError, subprocess.SubprocessError):
            return "the right to mount a file system"
        unmount(Path(folder))
    return ""


class Ballast:
    """A file that takes all the room of a disk."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ballast"

    def fill(self) -> None:
        """Take what room there is now."""
        with self._path.open("ab") as file:
            while True:
                state = os.fstatvfs(file.fileno())
                room = max(state.f_bavail * state.f_frsize, _BLOCK_BYTES)
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), room)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    if room == _BLOCK_BYTES:
                        return

    def remove(self) -> None:
        """Give the room back."""
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def filled(*folders: Path) -> Iterator[list[Ballast]]:
    """Fill disks while entered."""
    found = [Ballast(folder) for folder in folders]
    try:
        for ballast in found:
            ballast.fill()
        yield found
    finally:
        for ballast in found:
            ballast.remove()
