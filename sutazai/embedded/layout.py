"""Where everything lies in a home, and the locks that tell who is alive."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sutazai.errors import ConfigurationError, Conflict

MAX_SOCKET_PATH_BYTES = 90
"""The kernels allow 108 (Linux) or 104 (macOS); supervisord binds a longer name first."""


class Layout:
    """The files and folders of one home; the path is made absolute, links in it resolved."""

    def __init__(self, home: Path) -> None:
        self.home = home.expanduser().resolve()
        self.env = self.home / "env"
        self.credentials = self.home / "credentials.json"
        self.postgresql = self.home / "postgresql"
        self.valkey = self.home / "valkey"
        self.logs = self.home / "log"
        self.run = self.home / "run"
        self.locks = self.run / "programs"
        self.pidfile = self.run / "supervisord.pid"
        self._lock = self.run / "supervisord.lock"
        self._socket_record = self.run / "socket"

    def make(self) -> bool:
        """Make the folders, for this user only; return whether the home is new.

        A folder that exists keeps its mode, so naming the wrong one as home does no harm.
        """
        try:
            fresh = not self.home.exists() or not any(self.home.iterdir())
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (owner := self.home.stat().st_uid) != os.geteuid():
                raise ConfigurationError(
                    f"The home {self.home} belongs to user {owner}: be that user, or use --home."
                )
            if fresh:
                self.home.chmod(0o700)
            for folder in (self.logs, self.run, self.locks):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"The home {self.home} cannot be used: {error}") from None
        return fresh

    def log(self, program: str) -> Path:
        """Return the log file of a program."""
        return self.logs / f"{program}.log"

    @property
    def socket(self) -> Path:
        """The supervisor's socket: in the home, or where `make_socket_path` put it."""
        if self._socket_record.exists():
            return Path(self._socket_record.read_text().strip())
        return self.run / "supervisor.sock"

    def make_socket_path(self) -> Path:
        """Choose a path for the socket, outside the home when that is too deep; remove a stale one.

        Call it only while holding the home's lock.
        """
        self.remove_socket()
        path = self.run / "supervisor.sock"
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            # mkdtemp makes a folder of mode 0700 with a name that nobody can guess.
            path = Path(tempfile.mkdtemp(prefix="sutazai-", dir="/tmp")) / "supervisor.sock"
            self._socket_record.write_text(f"{path}\n")
        return path

    def remove_socket(self) -> None:
        """Remove the socket, and its folder outside the home if there is one."""
        path = self.socket
        path.unlink(missing_ok=True)
        if self._socket_record.exists():
            if path.parent.is_dir():
                path.parent.rmdir()
            self._socket_record.unlink()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the home's lock; raises `Conflict` when another process supervises it."""
        with self._lock.open("a+") as file:
            if not lock(file):
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise Conflict(
                    f"{self.home} is already in use by the process {holder}: "
                    "stop it with `sutazai down`, or use another --home."
                )
            write_pid(file)
            yield


def lock(file: IO[str]) -> bool:
    """Lock a file until every process that inherited it has gone; False: another holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_pid(file: IO[str]) -> None:
    """Make the file's content the id of this process."""
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()
