"""One process each, in the foreground: what containers and supervisors start."""

from __future__ import annotations

import signal
import threading
import warnings
from typing import Annotated

import typer

from sutazai.cli.output import console
from sutazai.settings import prepare_flower, settings

AgentName = Annotated[str, typer.Argument(help="The agent's name; `sutazai agents` lists them.")]


def worker(
    agent: AgentName,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="Tasks at once; default: SUTAZAI_CONCURRENCY, else the agent's."
        ),
    ] = None,
) -> None:
    """Run one agent's Celery worker."""
    from sutazai.celery import app
    from sutazai.tasks import load

    settings().require_services()
    declared = load().get(agent)
    slots = concurrency or settings().concurrency.get(declared.name, declared.slots[1])
    # Celery warns of running as root, as containers and `sutazai up` of root do.
    warnings.filterwarnings("ignore", message="(?s).*superuser privileges.*")
    app.worker_main(
        [
            "--quiet",
            "worker",
            "--queues",
            declared.name,
            "--hostname",
            f"{declared.name}@%h",
            "--concurrency",
            str(slots),
            "--pool",
            declared.pool,
            "--without-gossip",
            "--without-mingle",
            "--heartbeat-interval",
            "10",
        ]
    )


def api(
    agents: Annotated[str, typer.Argument(help="An agent, several as `a,b`, or `all`.")],
) -> None:
    """Run the HTTP fronts of one agent, of several, or of all, each on its own port."""
    from sutazai.api.server import serve
    from sutazai.celery import bell
    from sutazai.tasks import load

    settings().require_services()
    raise typer.Exit(serve(load().choose(agents), bell()))


def relay() -> None:
    """Run a relay: it rings what is due and rescues what is lost. Any number may run."""
    from sutazai.celery import bell
    from sutazai.relay import Relay

    settings().require_services()
    running = Relay(bell())
    for number in (signal.SIGTERM, signal.SIGINT):
        # On a thread: a handler may interrupt whoever holds the locks that stopping needs.
        signal.signal(number, lambda *_: threading.Thread(target=running.stop).start())
    running.run()
    bell().close()


def beat() -> None:
    """Run Beat, which submits scheduled tasks. Any number may run."""
    from sutazai.celery import app

    settings().require_services()
    app.start(["--quiet", "beat"])


def flower(
    port: Annotated[
        int | None, typer.Option(help="Default: 5555 plus SUTAZAI_PORT_OFFSET.")
    ] = None,
) -> None:
    """Run the Flower dashboard; its API is open, so it refuses to listen beyond loopback bare."""
    from sutazai.celery import app

    settings().require_services()
    prepare_flower()
    app.start(["--quiet", "flower", *([f"--port={port}"] if port else [])])


def migrate() -> None:
    """Bring the database's schema up to date."""
    from sutazai.migration import migrate as upgrade

    settings().require_services()
    console.print(f"The schema is at revision {upgrade()}.")
