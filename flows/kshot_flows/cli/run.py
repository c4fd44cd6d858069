"""The commands that run flows: run, compare, recipes."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from contextlib import nullcontext, redirect_stdout
from typing import Annotated

import typer

from kshot_flows.console.tables import console, table

# torch, prefect and mlflow take seconds to import: every command imports what it needs, so that --help is quick.

Recipe = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a bundled recipe.", show_default=False),
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values to override.", show_default=False),
]


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_commands(app: typer.Typer) -> None:
    """Make these functions commands of `app`."""
    for command in (run, compare, recipes):
        app.command()(command)


def prepare_prefect() -> None:
    """Silence Prefect's console logging and shorten its timeouts; to be called before Prefect is imported."""
    for name, value in _PREFECT.items():
        os.environ.setdefault(name, value)
    logging.raiseExceptions = False  # else it prints log records that it could not send


_PREFECT = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # kshot's tasks print their own progress
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "PREFECT_CLIENT_MAX_RETRIES": "2",
    "PREFECT_API_REQUEST_TIMEOUT": "15",
}


def stop(message: str) -> None:
    typer.secho(f"\n{message}", err=True)
    sys.exit(130)


def run(
    recipe: Recipe,
    changes: Changes = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Report time and memory per step, and trace torch operations.")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Training processes that share each step's episodes.", show_default="1"),
    ] = None,
) -> None:
    """Run a recipe: version the data, meta-train, evaluate, export to ONNX, register, promote.

    Unchanged steps are reused from earlier runs, and an interrupted training resumes from its last checkpoint:

    [cyan]kshot run glyphs-protonet[/cyan]

    [cyan]kshot run glyphs-protonet training.lr=0.01 evaluation.shots=[1,5][/cyan]

    [cyan]kshot run my-recipe.toml learner.name=maml[/cyan]

    Show time and memory per step as a table, and trace torch's operations for Perfetto or chrome://tracing:

    [cyan]kshot run glyphs-protonet seed=2 --profile[/cyan]
    """
    prepare_prefect()
    again = shlex.join(["kshot", "run", recipe, *(changes or []), *(["--ranks", str(ranks)] if ranks else [])])
    if ranks:
        os.environ["KSHOT_RANKS"] = str(ranks)
    try:
        from kshot_flows.console import profiling
        from kshot_flows.report import summary
        from kshot_flows.run import start

        with profiling.profiled() if profile else nullcontext() as found:
            done = start.run(recipe, changes or [])
        summary.show(done, again)
        if found:
            summary.show_profile(found, start.keep_profile(found, done))
    except KeyboardInterrupt:
        stop(f"Stopped. What was finished is kept, and training goes on from its last checkpoint: {again}")


def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|KEY=VALUE",
            help="Recipes, and values to override in all of them; quote a recipe with its own overrides.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Compare recipes on the same test episodes: accuracy, paired differences, times, sizes.

    Each is trained, evaluated and exported, unless an unchanged result exists; nothing is registered.

    Differences are relative to the first recipe:

    [cyan]kshot compare omniglot-protonet omniglot-maml[/cyan]

    [cyan]kshot compare glyphs-protonet "glyphs-protonet learner.name=maml" training.steps=300[/cyan]
    """
    prepare_prefect()
    again = shlex.join(["kshot", "compare", *recipes])
    try:
        from kshot_flows.report import summary
        from kshot_flows.run import start

        if as_json:
            with redirect_stdout(sys.stderr):  # progress lines
                found = start.compare(recipes)
            about = {"folder": str(found.folder), "mlflow_run": found.run}
            typer.echo(json.dumps({**found.standings.to_dict(), **about}, indent=2))
        else:
            summary.show_comparison(start.compare(recipes), again)
    except KeyboardInterrupt:
        stop(f"Stopped. What was finished is kept, and training goes on from its last checkpoint: {again}")


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the bundled recipes, or print one.

    To write your own, start from a copy: [cyan]kshot recipes photos-finetune > my.toml[/cyan], then
    [cyan]kshot run my.toml[/cyan]
    """

    from kshot_flows import recipes

    if name is not None:
        typer.echo(recipes.find(name).read_text(), nl=False)
        return
    if as_json:
        known = recipes.recipes().items()
        listing = [{"name": each, "about": recipes.about(path), "path": str(path)} for each, path in known]
        typer.echo(json.dumps(listing, indent=2))
        return
    listed, out = table("recipe", "what it is"), console(markup=False)
    for each, path in recipes.recipes().items():
        listed.add_row(each, recipes.about(path))
    out.print(listed)
    ways = f"kshot recipes {each} > my.toml", f"cp {shlex.quote(str(path))} my.toml"
    out.print(f"Make your own of one: {', or '.join(ways)}", soft_wrap=True)
