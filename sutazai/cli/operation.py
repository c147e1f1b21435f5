"""Commands for those who run the system: `status` and `doctor`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.live import Live

from sutazai.bell import Bell
from sutazai.cli.output import AsJSON, console, fail, print_json, table
from sutazai.embedded import Supervisor
from sutazai.errors import DatabaseUnavailable
from sutazai.settings import settings

REFRESH_S = 2.0


def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Show one row an agent: health, workers, queued, running, oldest age, tasks a minute.

    Exit code: 0 when all are healthy, else 1.
    """
    settings().require_services()
    try:
        rows = _read()
    except DatabaseUnavailable as error:
        raise typer.Exit(fail(str(error), 1)) from None
    if watch:
        with Live(_table(rows), console=console, refresh_per_second=2) as live:
            try:
                while True:
                    time.sleep(REFRESH_S)
                    rows = _read()
                    live.update(_table(rows))
            except KeyboardInterrupt:
                pass
    elif as_json:
        print_json(rows)
    else:
        console.print(_table(rows))
    raise typer.Exit(0 if all(row["health"] == "healthy" for row in rows) else 1)


def doctor(as_json: AsJSON = False) -> None:
    """Examine configuration, stores, schema, ports, workers, agents and the model server.

    Exit code: 1 when there is an error; warnings do not count.
    """
    from sutazai.cli.doctor import examine

    findings = list(examine())
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        console.print(table(("WHAT", "", "FOUND", "HOW TO MEND IT"), findings))
    raise typer.Exit(1 if any(finding.level == "error" for finding in findings) else 0)


def _read() -> list[dict[str, Any]]:
    from sutazai import db, statements
    from sutazai.api.health import assess, check_services
    from sutazai.tasks import load

    names = started(load().agents)
    with db.transaction() as connection:
        states = connection.execute(statements.status(names)).all()
        ended = {row.agent: row for row in connection.execute(statements.activity(names, 60.0))}
    services = asyncio.run(check_services(_bell(), names[0])) if names else {}
    own = {
        name: {check: ask() for check, ask in load().get(name).health_checks.items()}
        for name in names
    }
    rows = []
    for state in states:
        report = assess(state.agent, state, services | own[state.agent])
        done = ended[state.agent]
        rows.append(
            {
                "agent": state.agent,
                "health": report.status,
                "workers": len(state.workers or []),
                "queued": state.depth,
                "running": state.running,
                "oldest_queued_s": state.oldest_age_s,
                "tasks_per_minute": done.succeeded + done.failed,
                "failed_per_minute": done.failed,
                "reasons": report.reasons,
            }
        )
    return rows


def _bell() -> Bell | None:
    """Return the bell where asking the broker takes one; to load Celery takes long."""
    if (settings().broker_url or "").startswith("redis"):
        return None
    from sutazai.celery import bell

    return bell()


def started(declared: Iterable[str]) -> list[str]:
    """Return the agents that `up` started here; all that are declared where it did not."""
    supervisor = Supervisor(settings().home)
    if not supervisor.running():
        return list(declared)
    running = {program.name for program in supervisor.programs()}
    return [name for name in declared if f"worker-{name}" in running]


def _table(rows: list[dict[str, Any]]) -> Any:
    columns = (
        ("AGENT", "agent"),
        ("HEALTH", "health"),
        ("WORKERS", "workers"),
        ("QUEUED", "queued"),
        ("RUNNING", "running"),
        ("OLDEST S", "oldest_queued_s"),
        ("TASKS/MIN", "tasks_per_minute"),
        ("FAILED/MIN", "failed_per_minute"),
    )
    return table(
        [*(title for title, _ in columns), "REASONS"],
        ([*(row[key] for _, key in columns), "; ".join(row["reasons"])] for row in rows),
    )
