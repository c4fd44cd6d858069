"""The maintenance commands: doctor, gc."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from kshot_flows.cli.errors import sentence
from kshot_runtime.errors import KshotError

Extra = StrEnum("Extra", ["trainings", "embeddings", "prefect", "mlflow", "dvc"])
_MARKS = {"ok": "[green]ok[/green]", "warning": "[yellow]warning[/yellow]", "wrong": "[bold red]wrong[/bold red]"}


def add_commands(app: typer.Typer) -> None:
    """Make these functions commands of `app`."""
    app.command()(doctor)
    app.command("gc")(collect)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check the installation and the project: libraries, devices, disk, MLflow, registry, Prefect, data, leftovers.

    Exit status 1 if anything is wrong.
    """
    from rich.markup import escape

    from kshot_flows.console.tables import console
    from kshot_flows.run.doctor import examine

    found = []
    for one in examine(sentence):
        found.append(one)
        if not as_json:
            todo = f" [dim]To do: {escape(one.todo)}[/dim]" if one.todo else ""
            line = f"{_MARKS[one.state]:<9} [bold]{one.what}[/bold]: {escape(one.says)}{todo}"
            console().print(line, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
    if any(one.state == "wrong" for one in found):
        raise typer.Exit(1)


def collect(
    yes: Annotated[bool, typer.Option("--yes", help="Remove without confirmation.")] = False,
    also: Annotated[
        list[Extra] | None,
        typer.Option(
            help="Also remove: unfinished trainings with their checkpoints; stored embeddings; Prefect's embedded "
            "records; runs deleted in MLflow (mlflow gc); data that no commit names (dvc gc).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Remove leftovers of interrupted work: temporary files, orphans, dead MLflow runs, duplicate versions.

    It lists them first, and asks.
    """
    from rich.markup import escape

    from kshot_flows.console.tables import console
    from kshot_flows.run import leftovers

    found = list(leftovers.find(also or ()))
    if not found:
        console().print("Nothing is left behind.")
        return
    for one in found:
        size = f"  {one.size / 2**20:.1f} MB" if one.size else ""
        console().print(escape(f"{one.kind}: {one.what}{size}"), soft_wrap=True)
    if not yes and not typer.confirm(f"Remove or finish these {len(found)}?"):
        raise typer.Exit(1)
    failed = []
    for one in found:
        try:
            one.remove()
        except Exception as error:
            failed.append(f"{one.kind} {one.what}: {sentence(error)}")
    if failed:
        raise KshotError("\n".join(failed))
    console().print(f"Done: {len(found)}, {sum(one.size for one in found) / 2**20:.1f} MB.")
