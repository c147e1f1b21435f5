"""Commands that submit and read tasks. They work on the database, so no front needs to run."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import orjson
import typer
from rich.live import Live
from rich.spinner import Spinner

from sutazai import payload
from sutazai.cli.output import AsJSON, cell, console, errors, print_json, table
from sutazai.errors import DatabaseUnavailable, InvalidInput, MalformedJSON, TaskNotFound
from sutazai.settings import settings
from sutazai.state import State

FAILED = 1
WAIT_RAN_OUT = 3
INTERRUPTED = 130
POLL_S = 0.1

tasks = typer.Typer(help="List and show tasks.", no_args_is_help=True)


def submit(
    agent: Annotated[str, typer.Argument(help="The agent's name.")],
    action: Annotated[str, typer.Argument(help="The action; `sutazai actions AGENT` lists them.")],
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", help="k=v; v is read as JSON, else as text. Repeatable."),
    ] = None,
    json_params: Annotated[
        str, typer.Option("--json-params", help="All parameters as one JSON object.")
    ] = "{}",
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print the task's id and return at once.")
    ] = False,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait at most.")] = 300.0,
    priority: Annotated[int, typer.Option(min=0, max=9, help="9 is the most urgent.")] = 5,
) -> None:
    """Submit a task and wait for its result, which is printed as JSON.

    Exit code: 0 succeeded, 1 failed or cancelled, 2 refused, 3 still not ended, 4 PostgreSQL
    unreachable, 130 interrupted (the task goes on).
    """
    from sutazai.celery import bell
    from sutazai.celery import submit as accept
    from sutazai.submission import Options, Submission
    from sutazai.tasks import load

    settings().require_services()
    submission = Submission(
        load().get(agent).get(action),
        _params(json_params, param or []),
        Options(priority=priority),
        "cli",
    )
    accept(submission)
    bell().close()
    if no_wait:
        print_json({"status": "accepted", "task_id": str(submission.task_id)})
        return
    raise typer.Exit(_follow(submission.task_id, wait))


@tasks.command("list")
def list_tasks(
    agent: Annotated[str | None, typer.Option(help="Only this agent's.")] = None,
    state: Annotated[
        list[State] | None, typer.Option(help="Only in this state. Repeatable.")
    ] = None,
    action: Annotated[str | None, typer.Option(help="Only of this action.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
    before: Annotated[str | None, typer.Option(help="Only older than this task.")] = None,
    as_json: AsJSON = False,
) -> None:
    """List tasks, newest first."""
    from sutazai import db, statements
    from sutazai.agent import normalise
    from sutazai.record import task_json

    settings().require_services()
    page = statements.tasks_page(
        limit=limit,
        agent=normalise(agent) if agent else None,
        action=action,
        states=[item.value for item in state or []],
        before=_task_id(before) if before else None,
    )
    with db.transaction() as connection:
        rows = connection.execute(page).all()
    if as_json:
        print_json([task_json(row) for row in rows])
        return
    console.print(
        table(
            ("TASK", "AGENT", "ACTION", "STATE", "CREATED", "WAIT S", "RUN S", "ERROR"),
            (
                (
                    row.task_id,
                    row.agent,
                    row.action,
                    row.state,
                    row.created_at,
                    row.wait_seconds,
                    row.run_seconds,
                    (row.error or {}).get("message"),
                )
                for row in rows
            ),
        )
    )


@tasks.command()
def show(
    task_id: Annotated[str, typer.Argument(help="The task's id.")], as_json: AsJSON = False
) -> None:
    """Show one task with its attempts."""
    task = _read(_task_id(task_id))
    if as_json:
        print_json(task)
        return
    for name, value in task.items():
        if name == "attempts":
            continue
        if isinstance(value, dict) and value:
            console.print(f"[bold]{name:20}[/bold]", end="")
            console.print_json(data=value)
        else:
            console.print(f"[bold]{name:20}[/bold] {cell(value or None)}", soft_wrap=True)
    if task["attempts"]:
        columns = ("attempt", "worker", "started_at", "ended_at", "outcome")
        console.print(
            table(
                [column.upper() for column in columns],
                ([attempt[column] for column in columns] for attempt in task["attempts"]),
            )
        )


def _params(text: str, pairs: list[str]) -> dict[str, Any]:
    try:
        params = payload.loads(text.encode())
    except MalformedJSON as error:
        raise InvalidInput(f"--json-params: {error}") from None
    if not isinstance(params, dict):
        raise InvalidInput("--json-params: give a JSON object, such as '{\"limit\": 3}'.")
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise InvalidInput(f"--param {pair!r}: give it as k=v.")
        try:
            params[name] = payload.loads(value.encode())
        except MalformedJSON:
            params[name] = value
    return params


def _follow(task_id: UUID, wait_s: float) -> int:
    """Show a task's progress until it ends; return the exit code."""
    until = time.monotonic() + wait_s
    try:
        with Live(console=errors, transient=True, refresh_per_second=8) as live:
            while True:
                try:
                    task = _read(task_id)
                except DatabaseUnavailable as error:
                    if time.monotonic() >= until:
                        raise DatabaseUnavailable(f"{error} The task goes on: {task_id}") from error
                    time.sleep(1.0)
                    continue
                state = State(task["state"])
                if state.is_terminal:
                    break
                if time.monotonic() >= until:
                    errors.print(
                        f"Still {state.value} after {wait_s:g} s; the task goes on: {task_id}"
                    )
                    return WAIT_RAN_OUT
                live.update(Spinner("dots", _line(task)))
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        errors.print(f"The task goes on: {task_id}")
        return INTERRUPTED
    if state is State.SUCCEEDED:
        print_json(task["result"])
        return 0
    errors.print(
        f"[red]{state.value}[/red] {task['error']['code']}: {cell(task['error']['message'])} "
        f"({task_id})",
        soft_wrap=True,
    )
    return FAILED


def _line(task: dict[str, Any]) -> str:
    progress = task["progress"]
    age_s = (
        datetime.now().astimezone() - datetime.fromisoformat(task["created_at"])
    ).total_seconds()
    text = f"{task['agent']} {task['action']}: {task['state']}, {age_s:.0f} s"
    if progress:
        text += f", {progress['fraction']:.0%} {progress['message']}"
    return cell(text)


def _read(task_id: UUID) -> dict[str, Any]:
    from sutazai import db, statements
    from sutazai.record import task_json

    settings().require_services()
    with db.transaction() as connection:
        row = connection.execute(statements.task(task_id)).first()
    if row is None:
        raise TaskNotFound(f"There is no task {task_id}.")
    plain: dict[str, Any] = orjson.loads(orjson.dumps(task_json(row), default=str))
    return plain


def _task_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise TaskNotFound(f"{text!r} is not a task's id.") from None
