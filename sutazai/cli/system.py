"""The whole system on one machine: `up`, `down`, `restart`, `logs`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from sutazai.cli.output import cell, console, errors
from sutazai.embedded import Supervisor
from sutazai.errors import ConfigurationError
from sutazai.settings import is_given, override, settings

STOPPED_WITHIN_S = 60.0
TAIL_LINES = 100


def up(
    agents: Annotated[
        str | None, typer.Option(help="Only these agents, as `a,b`; default: all.")
    ] = None,
    agent: Annotated[
        list[str] | None,
        typer.Option(help="An agent without packaging, as `module:agent`. Repeatable."),
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="Where data, logs and passwords lie; default: ./.sutazai.")
    ] = None,
    port_offset: Annotated[
        int | None, typer.Option(min=0, max=50_000, help="Added to every port.")
    ] = None,
    no_flower: Annotated[bool, typer.Option("--no-flower", help="Leave Flower out.")] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when all is healthy; `down` stops it.")
    ] = False,
) -> None:
    """Start everything on this machine: stores, workers, fronts, relay, Beat, Flower.

    PostgreSQL and Valkey are private ones unless SUTAZAI_DATABASE_URL and SUTAZAI_BROKER_URL name
    yours. Ctrl-C drains and stops all that was started; a second one stops at once.
    """
    own = settings()
    offset = own.port_offset if is_given("port_offset") else 0
    modules = own.agents if is_given("agents") else ()
    override(
        home=str((home or own.home).absolute()),
        port_offset=str(offset if port_offset is None else port_offset),
        agents=",".join([*modules, *(agent or ())]) or None,
    )
    from sutazai.cli.startup import System
    from sutazai.tasks import load

    for reference, why in load().faults.items():
        errors.print(f"[red]left out:[/red] {reference}: {cell(why)}", soft_wrap=True)
    chosen = load().choose(agents)
    with errors.status("Preparing …") as progress:
        code = System(chosen, flower=not no_flower, detach=detach).start(progress)
    raise typer.Exit(code)


def down() -> None:
    """Stop what `sutazai up` started: running tasks are drained, nothing is lost."""
    with errors.status("Stopping …"):
        Supervisor(settings().home).shutdown(wait_s=STOPPED_WITHIN_S)
    console.print("Stopped.")


def restart(
    agent: Annotated[str | None, typer.Argument(help="The agent; default: all of them.")] = None,
) -> None:
    """Restart an agent's worker, or all workers and fronts, after draining them."""
    from sutazai.tasks import load

    supervisor = Supervisor(settings().home)
    if agent:
        names = [f"worker-{load().get(agent).name}"]
    else:
        servers = {"postgresql", "valkey"}
        names = [program.name for program in supervisor.programs() if program.name not in servers]
    for name in names:
        with errors.status(f"Restarting {name} …"):
            supervisor.restart(name)
        console.print(f"Restarted {name}.")


def logs(
    agent: Annotated[
        str | None, typer.Argument(help="An agent, or a process such as `relay`; default: all.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines.")] = False,
) -> None:
    """Print the latest log lines of one agent's worker, or of every process."""
    folder = settings().home / "log"
    name = agent.replace("_", "-") if agent else "*"
    files = sorted(folder.glob(f"worker-{name}.log")) + sorted(folder.glob(f"{name}.log"))
    files = list(dict.fromkeys(files))
    if not files:
        raise ConfigurationError(f"There is no log of {agent or 'any process'} in {folder}.")
    width = max(len(file.stem) for file in files) if len(files) > 1 else 0
    try:
        for file, line in _lines(files, follow=follow):
            typer.echo(f"{file.stem:{width}} | {line}" if width else line)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _lines(files: Sequence[Path], *, follow: bool) -> Iterator[tuple[Path, str]]:
    offsets = {}
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as stream:
            for line in deque(stream, maxlen=TAIL_LINES):
                yield file, line.rstrip("\n")
            offsets[file] = stream.tell()
    while follow:
        for file in files:
            with file.open(encoding="utf-8", errors="replace") as stream:
                if file.stat().st_size < offsets[file]:
                    offsets[file] = 0  # it was rotated
                stream.seek(offsets[file])
                for line in stream:
                    yield file, line.rstrip("\n")
                offsets[file] = stream.tell()
        time.sleep(0.2)
