"""The command that runs a recipe on a schedule."""

from __future__ import annotations

from typing import Annotated

import typer

from kshot_flows.cli.run import Changes, Recipe


def add_commands(app: typer.Typer) -> None:
    """Make these functions commands of `app`."""
    app.command()(schedule)


def schedule(
    recipe: Recipe,
    changes: Changes = None,
    cron: Annotated[
        str, typer.Option(help="When: minute, hour, day, month, weekday.", show_default=False, metavar="EXPR")
    ] = ...,  # type: ignore[assignment]  # typer's way to say: needed
    timezone: Annotated[str, typer.Option(help="In which the expression is meant.")] = "UTC",
) -> None:
    """Run a recipe again and again, one run at a time, for as long as this command lives.

    Every night at three, from the data and the recipe as they are then:

    [cyan]kshot schedule glyphs-protonet --cron "0 3 * * *"[/cyan]

    A run on unchanged data and recipe uses everything again and takes seconds. For several machines, see
    flows/prefect.yaml.
    """
    from kshot_flows.run import schedules

    schedules.serve(recipe, changes or [], cron=cron, timezone=timezone)
