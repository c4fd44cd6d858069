"""The commands for schedules: `schedule`, and `schedules` with pause, resume, remove and watch."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from kshot_flows.cli.run import Changes, Recipe, prepare_prefect

schedules = typer.Typer(rich_markup_mode="rich", help="List schedules; pause, resume and remove them.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `kshot schedules` shows it.", show_default=False)]
Notify = Annotated[
    str | None,
    typer.Option(metavar="URL", help="POST a JSON line there when a run fails or is blocked.", show_default=False),
]


def add_commands(app: typer.Typer) -> None:
    """Make these functions commands of `app`."""
    app.command()(schedule)
    app.add_typer(schedules, name="schedules")


def schedule(
    recipe: Recipe,
    changes: Changes = None,
    cron: Annotated[
        str | None,
        typer.Option(help="Cron expression: minute hour day month weekday.", show_default=False, metavar="EXPR"),
    ] = None,
    every: Annotated[
        str | None,
        typer.Option(help="Or an interval from midnight, such as 6h.", show_default=False, metavar="DURATION"),
    ] = None,
    timezone: Annotated[str, typer.Option(help="Time zone of --cron and --every.")] = "UTC",
    notify: Notify = None,
) -> None:
    """Run a recipe on a schedule, one run at a time, for as long as this command runs.

    Every night at three, with the data and the recipe file as they are then:

    [cyan]kshot schedule glyphs-protonet --cron "0 3 * * *"[/cyan]

    [cyan]kshot schedule my-recipe.toml training.lr=0.01 --every 6h --notify https://example.com/hook[/cyan]

    It replaces an earlier schedule of the recipe. Missed runs are made up for by one. A run on unchanged data and
    recipe reuses every step and takes seconds. For several machines, see docs/schedules.md.
    """
    prepare_prefect()
    from kshot_flows.run import scheduler

    scheduler.serve(recipe, changes or [], cron=cron, every=every, timezone=timezone, notify=notify)


@schedules.callback(invoke_without_command=True)
def list_(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List schedules: when each runs, and how its last run ended; or pause, resume and remove one.

    In JSON: name, recipe, changes, when, timezone, status (active, paused, or stopped: no process serves it), next,
    last (how the last run ended), ended (when), page. Times are ISO 8601.
    """
    if context.invoked_subcommand is not None:
        return
    from kshot_flows.console.tables import console, table
    from kshot_flows.run import schedules

    found = schedules.listed()
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2, default=lambda time: time.isoformat()))
        return
    if not found:
        typer.echo("No schedules yet. One is made by: kshot schedule RECIPE --every 6h")
        return

    shown = table("name", "recipe", "when", "status", "next", "last run")
    for one in found:
        last = f"{one.last}, {one.ended.astimezone():%Y-%m-%d %H:%M}" if one.last and one.ended else ""
        following = f"{one.next.astimezone():%Y-%m-%d %H:%M}" if one.next else ""
        recipe, when = " ".join([one.recipe, *one.changes]), f"{one.when} ({one.timezone})"
        shown.add_row(one.name, recipe, when, one.status, following, last)
    out = console(markup=False)
    out.print(shown)
    for one in found:
        if one.status == schedules.STOPPED:
            out.print(f"Nothing serves {one.name}. This does, for as long as it lives: {one.command}", soft_wrap=True)


@schedules.command()
def pause(name: Name) -> None:
    """Start no runs of a schedule until it is resumed; a run in progress finishes."""
    from kshot_flows.run import schedules

    schedules.pause(name)
    typer.echo(f"{name} starts nothing until: kshot schedules resume {name}")


@schedules.command()
def resume(name: Name) -> None:
    """Resume a paused schedule at its next scheduled time."""
    from kshot_flows.run import schedules

    schedules.resume(name)
    typer.echo(f"{name} is active again.")


@schedules.command()
def remove(name: Name) -> None:
    """Remove a schedule and end its process, including a run in progress. Earlier runs stay recorded."""
    from kshot_flows.run import schedules

    schedules.remove(name)
    typer.echo(f"{name} is no schedule any more.")


@schedules.command()
def watch(notify: Notify = None) -> None:
    """For Prefect workers: have the server mark dead runs as crashed, and notify about failed ones.

    [cyan]kshot schedules watch --notify https://example.com/hook[/cyan]

    Run it once per Prefect server; again to change the address. `kshot schedule` does it for its own schedules.
    """
    from kshot_flows.run import schedules

    schedules.watch(notify)
    typer.echo("Prefect marks runs that died as crashed" + (f", and posts bad ends to {notify}." if notify else "."))
