"""Which files may be touched: nothing under a protected root, nothing behind a symbolic link.

Paths are judged by their real path, when a plan is made and again when it is carried out.
"""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sutazai.errors import InvalidInput
from sutazai.settings import settings

SYSTEM_ROOTS = tuple(
    Path(root)
    for root in (
        "/etc",
        "/boot",
        "/usr",
        "/bin",
        "/sbin",
        "/lib",
        "/lib32",
        "/lib64",
        "/libx32",
        "/proc",
        "/sys",
        "/dev",
        "/run",
        "/snap",
        "/nix",
        "/var/lib",
        "/var/spool",
        "/var/mail",
    )
)
"""What the system is made of, and where its services keep their data."""

_VIRTUAL = frozenset({Path("/proc"), Path("/sys"), Path("/dev")})

HOME_FOLDERS = (
    "Desktop",
    "Documents",
    "Music",
    "Pictures",
    "Public",
    "Templates",
    "Videos",
    ".config",
    ".gnupg",
    ".local",
    ".ssh",
)
"""What people keep in their home folder."""


def protected_roots() -> frozenset[Path]:
    """Return every protected folder, by its real path too."""
    homes = {Path(pwd.getpwuid(os.getuid()).pw_dir)}
    for parent in (Path("/home"), Path("/Users")):
        if parent.is_dir():
            homes.update(path for path in parent.iterdir() if path.is_dir())
    roots = {
        *SYSTEM_ROOTS,
        *(home / name for home in homes for name in HOME_FOLDERS),
        settings().home,
        Path(sys.prefix),
        Path(__file__).parents[2],
    }
    return frozenset(roots | {Path(os.path.realpath(root)) for root in roots})


def is_protected(path: Path, roots: frozenset[Path]) -> bool:
    """Whether a path is one of the roots or within one."""
    return path in roots or any(parent in roots for parent in path.parents)


def check(text: str, roots: frozenset[Path] | None = None) -> Path:
    """Return a path that may be changed; raises `InvalidInput` that says why it may not be."""
    path = Path(text)
    if not path.is_absolute():
        raise InvalidInput(f"{text} is not an absolute path.")
    normal = Path(os.path.normpath(path))
    real = Path(os.path.realpath(path))
    if is_protected(real, roots or protected_roots()) or real == Path("/"):
        raise InvalidInput(f"{text} is protected ({real}); nothing is changed there.")
    if real != normal:
        raise InvalidInput(
            f"{text} leads through a symbolic link; name the real path {real} if it is meant."
        )
    if not os.path.lexists(real):
        raise InvalidInput(f"{text} does not exist.")
    return real


def check_readable(text: str) -> Path:
    """Return the real path of a folder to look at, which changes nothing."""
    path = Path(text)
    if not path.is_absolute():
        raise InvalidInput(f"{text} is not an absolute path.")
    real = Path(os.path.realpath(path))
    if is_protected(real, _VIRTUAL):
        raise InvalidInput(f"{text} holds no files; the kernel makes up what is there.")
    if not real.is_dir():
        raise InvalidInput(f"{text} is not a folder.")
    return real


@contextmanager
def held_folder(path: Path) -> Iterator[int]:
    """Open a file's folder and hold it, so that it cannot be swapped for a link meanwhile.

    Yields a descriptor for the `dir_fd` arguments of `os`. Raises `InvalidInput` when the folder
    is not, or is no longer, what its path says, or is protected.
    """
    folder = path.parent
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise InvalidInput(f"{folder} cannot be opened: {error.strerror}.") from None
    try:
        link = Path(f"/proc/self/fd/{descriptor}")
        opened = Path(link.readlink() if link.is_symlink() else os.path.realpath(folder))
        if opened != folder:
            raise InvalidInput(f"{folder} leads through a symbolic link to {opened}.")
        if is_protected(opened / path.name, protected_roots()):
            raise InvalidInput(f"{path} is protected; nothing is changed there.")
        yield descriptor
    finally:
        os.close(descriptor)
