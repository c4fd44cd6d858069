"""The commands for plugin authors: new, check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kshot_flows.console.tables import console

if TYPE_CHECKING:
    from kshot_flows.plugins.check import Failure, Outcome

# Torch takes seconds to import, and `kshot --help` must not wait for it: every command imports what it needs.

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Create a plugin with your own algorithm, and check it against the learner contract.

    [cyan]kshot plugin new mine[/cyan]  writes a small project that works as it is; then change its algorithm.
    """,
)


@app.callback()
def plugin() -> None:
    pass


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the algorithm.", show_default=False)],
    into: Annotated[Path, typer.Option("--into", metavar="FOLDER", help="Parent folder of the project.")] = Path(),
) -> None:
    """Create a plugin project: a working algorithm to change, its tests and a recipe.

    [cyan]kshot plugin new mine[/cyan]
    """

    from kshot_flows.plugins import project as plugin_project

    files = plugin_project.create(name, into)
    out = console()
    out.print(f"[bold]{into / name}/[/bold] holds a plugin that works as it is:\n")
    out.print(_columns({path.name: what for path, what in files.items()}))
    out.print("\n[bold]Next[/bold]\n")
    out.print(_columns(plugin_project.commands(into / name)))


@app.command()
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An installed algorithm.", show_default=False)],
    setting: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Override a setting of the algorithm; repeatable.", show_default=False),
    ] = None,
) -> None:
    """Check an algorithm against every promise of the contract, on a toy problem; exit status 1 if any fails.

    [cyan]kshot plugin check protonet[/cyan]

    [cyan]kshot plugin check maml --setting norm=group --setting steps=2[/cyan]
    """
    import logging
    import tempfile

    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from kshot import plugins
    from kshot.testing import CHECKS
    from kshot_flows.plugins import check as plugin_check

    torch.set_num_threads(1)  # small tensors are faster so
    logging.getLogger("torch").setLevel(logging.ERROR)  # what a failed export logs is in its error, in words
    out = console()
    failures: list[Failure] = []
    exempt = 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar,
    ):
        subject = plugin_check.subject(name, setting or [], Path(folder))
        one = plugins.find().learner(name)
        out.print(f"[bold]{name}[/bold], of {one.distribution} {one.version}, on a toy problem:\n")
        row = bar.add_task("", total=len(CHECKS))
        for number, each in enumerate(CHECKS, 1):
            bar.update(row, description=plugin_check.promise(each), completed=number - 1)
            outcome = plugin_check.run(each, subject)
            out.print(_line(plugin_check.promise(each), outcome, again=outcome.failure in failures))
            if outcome.exempt:
                exempt += 1
            if outcome.failure:
                failures.append(outcome.failure)
                if number == 1:
                    out.print(f"\n[red]Mend this one first: the other {len(CHECKS) - 1} promises build on it.[/red]")
                    raise typer.Exit(1)
    if failures:
        out.print(f"\n[red]{name} breaks {len(failures)} of {len(CHECKS)} promises.[/red]")
        raise typer.Exit(1)
    kept = (
        f"all {len(CHECKS)} promises" if not exempt else f"{len(CHECKS) - exempt} promises, and is exempt from {exempt}"
    )
    out.print(f"\n[green]{name} keeps {kept}.[/green]")


def _line(promise: str, outcome: Outcome, again: bool) -> Any:
    """Print one check: its outcome, its duration, the promise, and the problem found."""
    from rich.table import Table
    from rich.text import Text

    failure = outcome.failure
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=6)
    grid.add_column(width=7, justify="right")
    grid.add_column(overflow="fold")
    how = Text("passed", "green")
    if failure:
        how = Text("FAILED", "bold red")
    elif outcome.exempt:
        how = Text("exempt", "yellow")
    grid.add_row(how, f"{outcome.seconds:.1f} s", Text(promise))
    if outcome.exempt:
        grid.add_row("", "", Text(outcome.exempt, "yellow"))
    if failure and again:
        grid.add_row("", "", Text("As above.", "red"))
    elif failure:
        for text, style in ((failure.what, "red"), (failure.where, "cyan"), (failure.advice, "")):
            if text:
                grid.add_row("", "", Text(text, style))
    return grid


def _columns(rows: dict[str, str]) -> Any:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="cyan")
    grid.add_column(style="dim")
    for first, second in rows.items():
        grid.add_row(f"  {first}", second)
    return grid
