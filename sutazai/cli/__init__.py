"""The command line, and the only place where the parts are put together.

Each command imports what it needs when it runs, so `sutazai --help` is quick.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from sutazai import log
from sutazai.cli import inspection, operation, process, queue, schedule, submission, system
from sutazai.cli.output import fail
from sutazai.errors import ConfigurationError, DatabaseUnavailable, SutazaiError
from sutazai.settings import settings

USAGE = 2
DATABASE_UNREACHABLE = 4
INTERRUPTED = 130

app = typer.Typer(
    name="sutazai",
    help="Agents as a durable, distributed task system on Celery and PostgreSQL.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

SYSTEM = "The whole system on this machine"
WORK = "Work"
INSPECTION = "What is there"
PROCESS = "Single processes, in the foreground, for containers"

app.command(rich_help_panel=SYSTEM)(system.up)
app.command(rich_help_panel=SYSTEM)(system.down)
app.command(rich_help_panel=SYSTEM)(operation.status)
app.command(rich_help_panel=SYSTEM)(operation.doctor)
app.command(rich_help_panel=SYSTEM)(system.restart)
app.command(rich_help_panel=SYSTEM)(system.logs)
app.command(rich_help_panel=WORK)(submission.submit)
app.command(rich_help_panel=WORK)(submission.batch)
app.add_typer(submission.tasks, name="tasks", rich_help_panel=WORK)
app.add_typer(queue.queue, name="queue", rich_help_panel=WORK)
app.add_typer(schedule.schedule, name="schedule", rich_help_panel=WORK)
app.command(rich_help_panel=INSPECTION)(inspection.agents)
app.command(rich_help_panel=INSPECTION)(inspection.actions)
app.command(rich_help_panel=PROCESS)(process.worker)
app.command(rich_help_panel=PROCESS)(process.api)
app.command(rich_help_panel=PROCESS)(process.relay)
app.command(rich_help_panel=PROCESS)(process.beat)
app.command(rich_help_panel=PROCESS)(process.flower)
app.command(rich_help_panel=PROCESS)(process.migrate)


@app.callback(invoke_without_command=True)
def _global(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("sutazai"))
        raise typer.Exit


def run(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code. Expected errors are one line on standard error."""
    try:
        log.configure(settings().log_format, settings().log_level)
        app(list(arguments), prog_name="sutazai")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else fail(str(stop.code), USAGE)
    except KeyboardInterrupt:
        return INTERRUPTED
    except DatabaseUnavailable as error:
        return fail(str(error), DATABASE_UNREACHABLE)
    except ConfigurationError as error:
        return fail(str(error), 1)
    except SutazaiError as error:
        more = error.details if len(error.details) > 1 else []
        return fail(str(error), USAGE, more)
    return 0
