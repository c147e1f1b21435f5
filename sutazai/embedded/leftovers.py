"""What a killed start has left behind in a home, and how it is cleared away.

A program of ours holds a lock on its file in `run/programs` for as long as any of its processes
lives. A server is recognised by its command line or working folder, which name this home. So
neither a process id that was given to another process nor another home's servers are ever touched.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from sutazai.embedded.layout import Layout, lock
from sutazai.embedded.wait import wait_until
from sutazai.errors import ConfigurationError


def recover(home: Path, program_grace_s: float = 10.0) -> None:
    """Stop the processes that an earlier start left running in this home, and remove stale files.

    Raises `Conflict` when the home is being supervised, `ConfigurationError` when something
    cannot be stopped. program_grace_s: how long workers may drain before they are killed.
    """
    layout = Layout(home)
    layout.make()
    with layout.exclusive():
        clear(layout, program_grace_s)


def clear(layout: Layout, program_grace_s: float = 10.0) -> None:
    """Do what `recover` does; the caller holds the home's lock."""
    _stop_programs(layout, program_grace_s)
    _stop_servers(layout)
    _remove_foreign_postmaster_file(layout)
    layout.remove_socket()
    layout.pidfile.unlink(missing_ok=True)


def _stop_programs(layout: Layout, grace_s: float) -> None:
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        held = [path for path in layout.locks.glob("*.lock") if _is_held(path)]
        for path in held:
            _signal_group(path, number)
        if wait_until(lambda held=held: not any(map(_is_held, held)), wait_s):  # type: ignore[misc]
            return
    raise ConfigurationError(
        f"Processes of an earlier start of {layout.home} do not stop: {[p.stem for p in held]}"
    )


def _is_held(path: Path) -> bool:
    with path.open("a+") as file:
        return not lock(file)


def _signal_group(path: Path, number: signal.Signals) -> None:
    # The lock is held, so the group that the program made for itself still exists.
    with suppress(ValueError, ProcessLookupError, PermissionError):
        os.killpg(int(path.read_text()), number)


def _stop_servers(layout: Layout) -> None:
    rounds: tuple[tuple[Callable[[Layout], list[psutil.Process]], signal.Signals, float], ...] = (
        (_main_servers, signal.SIGINT, 30.0),  # PostgreSQL's fast shutdown; Valkey stops as well
        (_main_servers, signal.SIGQUIT, 5.0),  # PostgreSQL's immediate shutdown
        (_all_servers, signal.SIGKILL, 5.0),
    )
    for find, number, wait_s in rounds:
        servers = find(layout)
        for server in servers:
            with suppress(psutil.Error):
                server.send_signal(number)
        # Without their postmaster, PostgreSQL's other processes end by themselves.
        if wait_until(lambda: not _all_servers(layout), wait_s if servers else 3.0):
            return
    raise ConfigurationError(
        f"Servers of an earlier start of {layout.home} do not stop: "
        f"{[server.pid for server in _all_servers(layout)]}"
    )


def _main_servers(layout: Layout) -> list[psutil.Process]:
    """Return the PostgreSQL and Valkey processes whose command line names this home."""
    arguments = {str(layout.postgresql), str(layout.valkey / "valkey.conf")}
    return [
        process
        for process in psutil.process_iter(["cmdline", "name"])
        if process.info["name"] in {"postgres", "valkey-server"}
        and arguments.intersection(process.info["cmdline"] or ())
    ]


def _all_servers(layout: Layout) -> list[psutil.Process]:
    """Return those, and PostgreSQL's other processes, which only their working folder tells."""
    folder = str(layout.postgresql)
    rest = [
        process
        for process in psutil.process_iter(["name", "cwd"])
        if process.info["name"] == "postgres" and process.info["cwd"] == folder
    ]
    return list({process.pid: process for process in (*_main_servers(layout), *rest)}.values())


def _remove_foreign_postmaster_file(layout: Layout) -> None:
    """Remove a postmaster.pid whose process id now belongs to something else.

    PostgreSQL would refuse to start. In any other case the file stays: by the shared memory that
    it names, PostgreSQL finds out whether processes of a killed server still live.
    """
    path = layout.postgresql / "postmaster.pid"
    with suppress(FileNotFoundError, ValueError, IndexError):
        if psutil.pid_exists(int(path.read_text().splitlines()[0])):
            path.unlink()
