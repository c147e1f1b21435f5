"""Commands that read declarations only."""

from __future__ import annotations

from typing import Annotated

import typer

from sutazai.cli.output import AsJSON, console, errors, print_json, table
from sutazai.settings import settings


def agents(as_json: AsJSON = False) -> None:
    """List the agents: port, slots, and what each is for."""
    from sutazai.tasks import load

    found = load()
    if as_json:
        print_json(
            {
                "agents": [
                    agent.describe().model_dump()
                    | {"port": settings().port(agent.name, agent.port)}
                    for agent in found.agents.values()
                ],
                "faults": found.faults,
            }
        )
    else:
        console.print(
            table(
                ("AGENT", "PORT", "POOL", "SLOTS", "ACTIONS", "WHAT IT IS FOR"),
                (
                    (
                        agent.name,
                        settings().port(agent.name, agent.port),
                        agent.pool,
                        "{}–{}–{}".format(*agent.slots),
                        len(agent.actions),
                        agent.summary,
                    )
                    for agent in found.agents.values()
                ),
            )
        )
    for reference, why in found.faults.items():
        errors.print(f"[red]cannot be imported:[/red] {reference}: {why}", soft_wrap=True)


def actions(
    agent: Annotated[str, typer.Argument(help="The agent's name.")], as_json: AsJSON = False
) -> None:
    """List an agent's actions with their parameters."""
    from sutazai.tasks import load

    declared = load().get(agent)
    if as_json:
        print_json(
            [
                {
                    "action": action.name,
                    "description": action.doc,
                    "params": action.params_schema,
                    "result": action.result_schema,
                    "time_limit_s": action.time_limit_s,
                    "max_attempts": action.max_attempts,
                }
                for action in declared.actions.values()
            ]
        )
        return
    for action in declared.actions.values():
        console.print(f"[bold]{action.name}[/bold]  {action.doc.splitlines()[0]}")
        schema = action.params_schema
        required = set(schema.get("required", ()))
        rows = [
            (
                f"  {name}",
                "required" if name in required else f"= {part.get('default')!r}",
                part.get("description", ""),
            )
            for name, part in schema["properties"].items()
        ]
        if rows:
            grid = table(("", "", ""), rows)
            grid.show_header = False
            console.print(grid)
