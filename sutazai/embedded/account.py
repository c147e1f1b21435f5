"""The account that the servers run under: PostgreSQL refuses to be root.

As an ordinary user the servers are simply this user's. As root they run as `postgres` or `nobody`,
which often may not enter the folders above the home or above the binaries (/root is closed to
everybody else). They are then given one capability, to pass closed folders, and no way to gain
another. `dac_read_search` allows reading only; containers usually withhold it from root, and there
`dac_override` takes its place.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sutazai.errors import ConfigurationError

_SYSTEM_USERS = ("postgres", "nobody")
_CAPABILITIES = (None, "dac_read_search", "dac_override")


@dataclass(frozen=True)
class Account:
    """A user and group, and the one capability it needs; `uid` None is whoever we are."""

    uid: int | None = None
    gid: int | None = None
    capability: str | None = None

    def command(
        self, argv: Sequence[str], die_signal: signal.Signals | None = None
    ) -> tuple[str, ...]:
        """Return the command that executes argv under this account.

        die_signal: sent to it when its parent dies; changing the user clears what the parent set.
        """
        if self.uid is None:
            return tuple(argv)
        prefix = [
            shutil.which("setpriv") or "/usr/bin/setpriv",
            f"--reuid={self.uid}",
            f"--regid={self.gid}",
            "--clear-groups",
            "--no-new-privs",
        ]
        if self.capability:
            # no_setuid_fixup: otherwise access(2), by which initdb finds the other binaries,
            # disregards capabilities of users other than root (credentials(7), access(2)).
            prefix += [
                "--securebits=+no_setuid_fixup",
                f"--inh-caps=-all,+{self.capability}",
                f"--ambient-caps=-all,+{self.capability}",
            ]
        if die_signal is not None:
            prefix.append(f"--pdeathsig={die_signal.name.removeprefix('SIG')}")
        return (*prefix, *argv)

    def own(self, path: Path) -> None:
        """Give a file or folder to this account."""
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)

    def with_access(self, folder: Path, binary: Path) -> Account:
        """Return this account with the least that lets it enter the folder and run the binary."""
        if self.uid is None:
            return self
        fault = ""
        for capability in _CAPABILITIES:
            account = Account(self.uid, self.gid, capability)
            fault = account._try(folder, binary)
            if not fault:
                return account
        raise ConfigurationError(
            f"As root, PostgreSQL is run as user {self.uid}, who cannot reach both {binary.parent} "
            f"and {folder}: run as an ordinary user, or install and use --home elsewhere. ({fault})"
        )

    def _try(self, folder: Path, binary: Path) -> str:
        """Return what went wrong, or an empty string."""
        script = 'cd "$1" && exec "$2" --version'
        command = self.command(("/bin/sh", "-c", script, "sh", str(folder), str(binary)))
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=30, cwd="/"
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return "" if done.returncode == 0 else done.stderr.strip() or f"exit {done.returncode}"


def server_account() -> Account:
    """Return the account for the servers: ourselves, or a system user when we are root."""
    if os.geteuid() != 0:
        return Account()
    for name in _SYSTEM_USERS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid)
    raise ConfigurationError(
        "PostgreSQL does not run as root, and there is neither a user postgres nor nobody: "
        "run as an ordinary user."
    )
