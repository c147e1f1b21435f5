"""Commands that submit and read tasks. They work on the database, so no front needs to run."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any
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

if TYPE_CHECKING:
    from sqlalchemy import Row

FAILED = 1
WAIT_RAN_OUT = 3
INTERRUPTED = 130
POLL_S = 0.1
WATCH_POLL_S = 0.3

Agent = Annotated[str, typer.Argument(help="The agent's name.")]
Label = Annotated[list[str] | None, typer.Option(help="key=value; all must hold. Repeatable.")]
Since = Annotated[
    str | None, typer.Option(metavar="INSTANT", help="At or after this, as 2026-01-31T12:00:00Z.")
]
Until = Annotated[str | None, typer.Option(metavar="INSTANT", help="Before this instant.")]

tasks = typer.Typer(help="List, show, watch, cancel and retry tasks.", no_args_is_help=True)


def submit(
    agent: Agent,
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
    idempotency_key: Annotated[
        str | None,
        typer.Option(help="The same key with the same request is the same task: safe to repeat."),
    ] = None,
    run_at: Annotated[
        str | None,
        typer.Option(metavar="INSTANT", help="Not before this, as 2026-01-31T12:00:00Z."),
    ] = None,
    deadline_at: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="Still queued then, the task fails.")
    ] = None,
    max_attempts: Annotated[
        int | None, typer.Option(help="Failures allowed; default: the action's.")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds an attempt may run; default: the action's.")
    ] = None,
    concurrency_key: Annotated[
        str | None, typer.Option(help="Of tasks with an equal key only so many run at once.")
    ] = None,
    on_conflict: Annotated[
        str | None,
        typer.Option(
            help="While a task with the same concurrency key has not ended: enqueue (default), "
            "reject, join, or replace, which cancels it."
        ),
    ] = None,
    callback_url: Annotated[
        str | None, typer.Option(help="Where the ended task is posted to, signed.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="key=value, to find tasks by. Repeatable.")
    ] = None,
) -> None:
    """Submit a task and wait for its result, which is printed as JSON.

    Exit code: 0 succeeded, 1 failed or cancelled, 2 refused, 3 still not ended, 4 PostgreSQL
    unreachable, 130 interrupted (the task goes on).
    """
    from sutazai import callbacks
    from sutazai.celery import bell
    from sutazai.celery import submit as accept
    from sutazai.submission import Options, Submission
    from sutazai.tasks import load

    settings().require_services()
    options = given(
        priority=priority,
        idempotency_key=idempotency_key,
        run_at=run_at,
        deadline_at=deadline_at,
        max_attempts=max_attempts,
        time_limit_s=time_limit,
        concurrency_key=concurrency_key,
        on_conflict=on_conflict,
        callback_url=callback_url,
        labels=read_labels(label),
    )
    submission = Submission(
        load().get(agent).get(action),
        read_params(json_params, param),
        callbacks.checked(payload.parse(Options, options)),
        "cli",
    )
    task_id = accept(submission).task_id
    bell().close()
    if no_wait:
        print_json({"status": "accepted", "task_id": str(task_id)})
        return
    raise typer.Exit(_follow(task_id, wait))


def batch(
    agent: Agent,
    file: Annotated[
        typer.FileBinaryRead,
        typer.Argument(help="One JSON object a line, as the routes take it; - reads stdin."),
    ],
) -> None:
    """Submit many tasks, all or none, and print their ids in order.

    A line is `{"action": "...", "params": {}, "options": {}}`, with the options of `POST /tasks`.
    Exit code: 0 accepted, 2 refused, 4 PostgreSQL unreachable.
    """
    from sutazai import admission, db
    from sutazai.api.batch import check_number, read_item
    from sutazai.tasks import load

    settings().require_services()
    declared = load().get(agent)
    submissions = [
        read_item(declared, _read_line(line, number), f"Line {number}", "cli")
        for number, line in enumerate(file, start=1)
        if line.strip()
    ]
    check_number(len(submissions))
    with db.transaction() as connection:
        made = admission.accept_many(connection, submissions, limit=declared.queue_limit)
    print_json({"status": "accepted", "task_ids": [str(new) for new in made]})


def _read_line(line: bytes, number: int) -> Any:
    try:
        return payload.loads(line)
    except (MalformedJSON, InvalidInput) as error:
        raise InvalidInput(f"Line {number}: {error}") from None


@tasks.command("list")
def list_tasks(
    agent: Annotated[str | None, typer.Option(help="Only this agent's.")] = None,
    state: Annotated[
        list[State] | None, typer.Option(help="Only in this state. Repeatable.")
    ] = None,
    action: Annotated[str | None, typer.Option(help="Only of this action.")] = None,
    label: Label = None,
    since: Since = None,
    until: Until = None,
    parent: Annotated[str | None, typer.Option(help="Only the children of this task.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
    before: Annotated[
        str | None, typer.Option(help="Only older than this task, which must be there.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """List tasks, newest first; --since and --until mean when they were accepted."""
    from sutazai import db
    from sutazai.agent import normalise
    from sutazai.api.tasks import Cursor, TasksQuery, page_of
    from sutazai.record import task_json

    settings().require_services()
    wanted = given(
        action=action,
        state=state,
        label=label,
        since=since,
        until=until,
        parent_id=_task_id(parent) if parent else None,
        limit=limit,
    )
    if before:
        last = _row(_task_id(before))
        wanted["cursor"] = Cursor(last.created_at, last.task_id)
    query = payload.parse(TasksQuery, wanted)
    with db.transaction() as connection:
        page = page_of(query, normalise(agent) if agent else None)
        rows = connection.execute(page).all()[:limit]
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


@tasks.command()
def watch(
    task_id: Annotated[str, typer.Argument(help="The task's id.")],
    wait: Annotated[float, typer.Option(min=0, help="Seconds to watch at most.")] = 86_400.0,
    as_json: AsJSON = False,
) -> None:
    """Print what happens to a task, line by line, until it has ended.

    Exit code: 0 succeeded, 1 failed or cancelled, 3 still not ended.
    """
    from sutazai import db, record

    settings().require_services()
    wanted, after, until = _task_id(task_id), 0, time.monotonic() + wait
    while True:
        rows = db.run(record.follow(wanted, after))
        if not rows:
            raise TaskNotFound(f"There is no task {wanted}.")
        for event in record.events(rows[0], after):
            after = event.event_id
            _print_event(event, as_json=as_json)
            if event.kind == "result":
                raise typer.Exit(0 if event.data["state"] == State.SUCCEEDED else FAILED)
        if time.monotonic() >= until:
            raise typer.Exit(WAIT_RAN_OUT)
        time.sleep(WATCH_POLL_S)


def _print_event(event: Any, *, as_json: bool) -> None:
    if as_json:
        line = {"id": event.event_id, "event": event.kind, "data": event.data}
        typer.echo(orjson.dumps(line, default=str).decode())
        return
    data = event.data
    match event.kind:
        case "state":
            worker = f" on {data['worker']}" if data.get("worker") else ""
            error = f": {data['error']['message']}" if data.get("error") else ""
            text = f"{cell(data['state'])}{cell(worker + error) if worker + error else ''}"
        case "progress":
            text = f"{data['fraction']:.0%} {cell(data['message'])}"
        case "log":
            known = ("at", "level", "event")
            more = " ".join(f"{k}={v}" for k, v in data.items() if k not in known)
            text = cell(f"{data['level']}: {data['event']} {more}".rstrip())
        case _:
            return
    at = datetime.fromtimestamp(event.event_id / 1e9).astimezone()
    console.print(f"{at:%H:%M:%S}  {text}", soft_wrap=True)


@tasks.command()
def cancel(
    task_ids: Annotated[list[str], typer.Argument(help="The tasks' ids.")], as_json: AsJSON = False
) -> None:
    """Cancel tasks, durably: at once while queued, else the running action is told.

    Exit code: 0 all are cancelled or about to be, 1 some had ended already.
    """
    from sutazai import db, lifecycle, redis, statements

    settings().require_services()
    rows = []
    for wanted in map(_task_id, task_ids):
        with db.transaction() as connection:
            before = connection.execute(*statements.result(wanted)).first()
            if before is None:
                raise TaskNotFound(f"There is no task {wanted}.")
            ended = lifecycle.cancel(connection, wanted)
            after = connection.execute(*statements.result(wanted)).one()
        redis.announce_ended(ended)
        was_over = State(before.state).is_terminal
        result = f"had ended: {before.state}" if was_over else after.state
        if after.state in (State.RUNNING, State.WAITING):
            result = f"{after.state}, being cancelled"
        rows.append({"task_id": str(wanted), "result": result, "cancelled": not was_over})
    if as_json:
        print_json(rows)
    else:
        console.print(table(("TASK", "RESULT"), ((row["task_id"], row["result"]) for row in rows)))
    raise typer.Exit(0 if all(row["cancelled"] for row in rows) else FAILED)


@tasks.command()
def retry(
    task_id: Annotated[
        str | None, typer.Argument(help="One task; without it, all that the options find.")
    ] = None,
    agent: Annotated[str | None, typer.Option(help="Failed tasks of this agent.")] = None,
    action: Annotated[str | None, typer.Option(help="Only of this action.")] = None,
    state: Annotated[
        str | None, typer.Option(help="How they ended: failed (default) or cancelled.")
    ] = None,
    code: Annotated[str | None, typer.Option(help="Only with this error code.")] = None,
    since: Since = None,
    until: Until = None,
    label: Label = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="Replace a parameter. Repeatable.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0.001, help="So many are started a second.")] = 10.0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="So many at most.")] = 1000,
) -> None:
    """Make new tasks of ended ones, and print their ids; the old ones stay as they are.

    --since and --until mean when they ended.
    """
    from sutazai import db, replay
    from sutazai.celery import bell
    from sutazai.celery import submit as accept
    from sutazai.tasks import load

    settings().require_services()
    edited = read_params(None, param)
    if (task_id is None) == (agent is None):
        raise InvalidInput("Give either a task's id or --agent.")
    which = given(action=action, state=state, code=code, since=since, until=until)
    which |= given(labels=read_labels(label) or None)
    if task_id is None:
        wanted = payload.parse(
            replay.Filter,
            {"agent": agent, "params": edited, "rate_per_s": rate, "limit": limit, **which},
        )
        with db.transaction() as connection:
            made = replay.repeat_many(connection, wanted, load().agents)
    elif which:
        raise InvalidInput("What chooses among tasks goes with --agent, not with a task's id.")
    else:
        with db.transaction() as connection:
            again = replay.repeat_one(connection, _task_id(task_id), load().agents, edited=edited)
        made = [accept(again).task_id]
        bell().close()
    print_json({"status": "accepted", "task_ids": [str(new) for new in made]})


def read_params(text: str | None, pairs: list[str] | None) -> dict[str, Any]:
    """Return the parameters of --json-params and --param; raises `InvalidInput`."""
    try:
        params = payload.loads(("{}" if text is None else text).encode())
    except MalformedJSON as error:
        raise InvalidInput(f"--json-params: {error}") from None
    if not isinstance(params, dict):
        raise InvalidInput("--json-params: give a JSON object, such as '{\"limit\": 3}'.")
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise InvalidInput(f"--param {pair!r}: give it as k=v.")
        try:
            params[name] = payload.loads(value.encode())
        except MalformedJSON:
            params[name] = value
    return params


def read_labels(pairs: list[str] | None) -> dict[str, str]:
    """Return the labels of --label; raises `InvalidInput`."""
    labels = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise InvalidInput(f"--label {pair!r}: give it as key=value.")
        labels[name] = value
    return labels


def given(**values: Any) -> dict[str, Any]:
    """Return the options that were given; the others have the defaults of what takes them."""
    return {name: value for name, value in values.items() if value is not None}


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
    from sutazai.record import task_json

    plain: dict[str, Any] = orjson.loads(orjson.dumps(task_json(_row(task_id)), default=str))
    return plain


def _row(task_id: UUID) -> Row[Any]:
    from sutazai import db, statements

    settings().require_services()
    with db.transaction() as connection:
        row = connection.execute(statements.task(task_id)).first()
    if row is None:
        raise TaskNotFound(f"There is no task {task_id}.")
    return row


def _task_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise TaskNotFound(f"{text!r} is not a task's id.") from None
