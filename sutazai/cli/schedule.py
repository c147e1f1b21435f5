"""`sutazai schedule`: what runs by itself, and adding, changing, pausing and running it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sutazai import payload
from sutazai.cli.output import AsJSON, console, print_json, table
from sutazai.cli.submission import given, read_params
from sutazai.settings import settings

schedule = typer.Typer(
    help="List, add, change, pause, resume, remove and run schedules.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="The schedule's name.")]
Every = Annotated[
    float | None, typer.Option(help="Period in seconds, on its multiples since 1970.")
]
Cron = Annotated[
    str | None,
    typer.Option(help="'MINUTE HOUR DAY-OF-MONTH MONTH DAY-OF-WEEK', instead of --every."),
]
TimeZone = Annotated[
    str | None, typer.Option(help="Of --cron, such as Europe/Berlin. Default: UTC.")
]
Param = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", help="k=v; v is read as JSON, else as text. Repeatable."),
]
JSONParams = Annotated[
    str | None, typer.Option("--json-params", help="All parameters as one JSON object.")
]
Overlap = Annotated[
    str | None,
    typer.Option(
        help="While an earlier task has not ended: skip (default), queue, or replace, which "
        "cancels it."
    ),
]
CatchUp = Annotated[
    str | None,
    typer.Option(
        help="Of the ticks that passed while no Beat ran: none, last (default), or the last N."
    ),
]
Jitter = Annotated[
    float | None, typer.Option(help="Start up to so many seconds later, before the next tick.")
]
EachHost = Annotated[
    bool | None,
    typer.Option("--each-host/--any-host", help="One task on each live host, or one (default)."),
]
Expires = Annotated[
    bool | None,
    typer.Option("--expires/--no-expires", help="Still queued at the next tick, a task fails."),
]
Priority = Annotated[int | None, typer.Option(help="0 to 9; 9 is the most urgent. Default: 5.")]


@schedule.command("list")
def list_schedules(
    agent: Annotated[str | None, typer.Option(help="Only this agent's.")] = None,
    as_json: AsJSON = False,
) -> None:
    """List the schedules: when they tick, and what was missed (no Beat) or skipped (overlap)."""
    from sutazai import db, statements
    from sutazai.schedule import to_json
    from sutazai.tasks import load

    settings().require_services()
    name = load().get(agent).name if agent else None
    with db.transaction() as connection:
        rows = connection.execute(statements.all_schedules(name)).all()
    if as_json:
        print_json([to_json(row) for row in rows])
        return
    columns = ("SCHEDULE", "RUNS", "TICKS", "NEXT", "SOURCE", "MISSED", "SKIPPED", "")
    console.print(table(columns, [_cells(row) for row in rows]))


def _cells(row: Any) -> tuple[Any, ...]:
    times = f"every {row.every_s:g} s" if row.cron is None else f"{row.cron} {row.time_zone}"
    action = f"{row.agent}.{row.action}"
    next_at = row.next_tick_at if row.enabled else None
    state = "enabled" if row.enabled else "paused"
    return (row.name, action, times, next_at, row.source, row.missed, row.skipped, state)


@schedule.command()
def add(
    name: Name,
    agent: Annotated[str, typer.Argument(help="The agent's name.")],
    action: Annotated[str, typer.Argument(help="The action; `sutazai actions AGENT` lists them.")],
    every: Every = None,
    cron: Cron = None,
    time_zone: TimeZone = None,
    param: Param = None,
    json_params: JSONParams = None,
    overlap: Overlap = None,
    catch_up: CatchUp = None,
    jitter: Jitter = None,
    each_host: EachHost = None,
    expires: Expires = None,
    priority: Priority = None,
    paused: Annotated[bool, typer.Option("--paused", help="Do not start yet.")] = False,
) -> None:
    """Add a schedule; it first runs at its next tick."""
    from sutazai import db
    from sutazai import schedule as schedules
    from sutazai.tasks import load

    settings().require_services()
    values = _values(every, cron, time_zone, overlap, catch_up, jitter, each_host, expires)
    values |= {"name": name, "action": action, "params": read_params(json_params, param)}
    values |= given(priority=priority, enabled=not paused)
    new = payload.parse(schedules.NewSchedule, values)
    with db.transaction() as connection:
        row = schedules.add(connection, new, load().get(agent))
    print_json(schedules.to_json(row))


@schedule.command()
def change(
    name: Name,
    action: Annotated[str | None, typer.Option(help="Another action of the same agent.")] = None,
    every: Every = None,
    cron: Cron = None,
    time_zone: TimeZone = None,
    param: Param = None,
    json_params: JSONParams = None,
    overlap: Overlap = None,
    catch_up: CatchUp = None,
    jitter: Jitter = None,
    each_host: EachHost = None,
    expires: Expires = None,
    priority: Priority = None,
) -> None:
    """Change a schedule; what is not given stays, but parameters are given all anew."""
    values = _values(every, cron, time_zone, overlap, catch_up, jitter, each_host, expires)
    values |= given(action=action, priority=priority)
    if param or json_params is not None:
        values["params"] = read_params(json_params, param)
    _change(name, **values)


@schedule.command()
def pause(name: Name) -> None:
    """Make no more tasks until resumed, whatever is restarted; ticks meanwhile are not missed."""
    _change(name, enabled=False)


@schedule.command()
def resume(name: Name) -> None:
    """Go on with the next tick."""
    _change(name, enabled=True)


@schedule.command()
def remove(name: Name) -> None:
    """Remove a schedule; its tasks stay."""
    from sutazai import db
    from sutazai import schedule as schedules

    settings().require_services()
    with db.transaction() as connection:
        schedules.remove(connection, name)
    print_json({"status": "removed", "name": name})


@schedule.command()
def run(name: Name) -> None:
    """Make one task now, beside the ticks, and print its id."""
    from sutazai import db
    from sutazai import schedule as schedules
    from sutazai.celery import bell, submit
    from sutazai.tasks import load

    settings().require_services()
    with db.transaction() as connection:
        row = schedules.find(connection, name)
    task_id = submit(schedules.run_once(row, load().agents, source="cli")).task_id
    bell().close()
    print_json({"status": "accepted", "task_id": str(task_id)})


def _change(name: str, **values: Any) -> None:
    from sutazai import db
    from sutazai import schedule as schedules
    from sutazai.tasks import load

    settings().require_services()
    wanted = payload.parse(schedules.ScheduleChange, values)
    with db.transaction() as connection:
        row = schedules.change(connection, name, wanted, load().agents)
    print_json(schedules.to_json(row))


def _values(
    every: float | None,
    cron: str | None,
    time_zone: str | None,
    overlap: str | None,
    catch_up: str | None,
    jitter: float | None,
    each_host: bool | None,
    expires: bool | None,
) -> dict[str, Any]:
    """Return what was given, by the names of a schedule's fields."""
    on = None if each_host is None else "each-host" if each_host else "any-host"
    times = int(catch_up) if catch_up and catch_up.isdecimal() else catch_up
    return given(
        every_s=every,
        cron=cron,
        time_zone=time_zone,
        overlap=overlap,
        catch_up=times,
        jitter_s=jitter,
        on=on,
        expires=expires,
    )
