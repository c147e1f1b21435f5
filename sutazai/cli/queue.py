"""`sutazai queue`: pausing, draining, resuming and scaling an agent's queue."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sutazai.cli.output import AsJSON, console, print_json, table
from sutazai.errors import Unsupported
from sutazai.settings import settings

queue = typer.Typer(help="Show, pause, drain, resume and scale queues.", no_args_is_help=True)

AgentName = Annotated[str, typer.Argument(help="The agent's name.")]


@queue.command("list")
def list_queues(as_json: AsJSON = False) -> None:
    """List the queues: what is due, held, running, and whether they are paused or drain."""
    from sutazai.tasks import load

    _show([_read(name) for name in load().agents], as_json=as_json)


@queue.command()
def pause(agent: AgentName, as_json: AsJSON = False) -> None:
    """Start no more tasks until resumed; new ones are accepted and wait."""
    _change(agent, as_json=as_json, paused=True)


@queue.command()
def drain(agent: AgentName, as_json: AsJSON = False) -> None:
    """Accept no new tasks until resumed; those that are there are done."""
    _change(agent, as_json=as_json, draining=True)


@queue.command()
def resume(agent: AgentName, as_json: AsJSON = False) -> None:
    """Accept and start tasks again."""
    _change(agent, as_json=as_json, paused=False, draining=False)


@queue.command()
def scale(
    agent: AgentName,
    slots: Annotated[int, typer.Argument(min=1, help="Tasks at once in each worker.")],
) -> None:
    """Set how many tasks each worker of an agent runs at once, until it is restarted."""
    from sutazai.celery import CelerySystem
    from sutazai.tasks import load

    settings().require_services()
    declared = load().get(agent)
    system = CelerySystem()
    workers = [worker for worker in system.workers() if worker.agent == declared.name]
    if not workers:
        raise Unsupported(f"{declared.name} has no live worker.")
    rows = [
        (worker.name, worker.slots, system.resize(declared.name, worker.host, slots))
        for worker in workers
    ]
    console.print(table(("WORKER", "BEFORE", "NOW"), rows))
    fewest, _, most = declared.slots
    if not fewest <= slots <= most:
        console.print(f"{declared.name} is declared with {fewest} to {most} slots.")


def _change(agent: str, *, as_json: bool, **change: Any) -> None:
    from sutazai import db, lifecycle
    from sutazai.tasks import load

    settings().require_services()
    name = load().get(agent).name
    with db.transaction() as connection:
        lifecycle.set_queue(connection, name, **change)
    _show([_read(name)], as_json=as_json)


def _read(name: str) -> dict[str, Any]:
    from sutazai import db, record, statements
    from sutazai.tasks import load

    settings().require_services()
    [row] = db.run(statements.status([name]))
    return record.queue_json(row, load().get(name).queue_limit)


def _show(queues: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(queues)
        return
    columns = ("agent", "depth", "oldest_age_s", "held", "running", "slots", "limit")
    rows = [(*(found[column] for column in columns), _mode(found)) for found in queues]
    names = ("QUEUE", "DUE", "OLDEST S", "HELD", "RUNNING", "SLOTS", "LIMIT", "")
    console.print(table(names, rows))


def _mode(found: dict[str, Any]) -> str:
    modes = [mode for mode in ("paused", "draining") if found[mode]]
    return ", ".join(modes) or "open"
