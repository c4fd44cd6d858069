"""The command line: one word for everything that kshot does, and messages instead of tracebacks."""

from __future__ import annotations

import difflib
import gc
import os
import shlex
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kshot_flows import cli_algorithms, cli_data, cli_learn, cli_models, cli_plugin, cli_serve
from kshot_flows.tables import table
from kshot_runtime.errors import KshotError

# torch, prefect and mlflow take seconds to import: every command imports what it needs, so that --help is quick.


_ORDER = (
    "learn",
    "run",
    "data",
    "recipes",
    "compare",
    "algorithms",
    "plugin",
    "schedule",
    "models",
    "promote",
    "rollback",
    "history",
    "trace",
    "serve",
    "keys",
)


class _Group(TyperGroup):
    """Commands in the order in which one meets them, with a guess at what an unknown one was meant to be."""

    def list_commands(self, ctx: Any) -> list[str]:
        known = super().list_commands(ctx)
        return [name for name in _ORDER if name in known] + [name for name in known if name not in _ORDER]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            known = self.list_commands(ctx)
            close = difflib.get_close_matches(args[0], known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            ctx.fail(f"there is no command {args[0]!r}{hint} There are: {', '.join(known)}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Few-shot image classification, from versioned data to a served model.

    [bold]Your own photos[/bold], a folder for each class, to a page that knows them:

    [cyan]kshot learn ./photos[/cyan]

    [cyan]kshot serve models:/photos@production --space ./photos[/cyan]

    [bold]Without photos[/bold], data and all, in about three minutes: [cyan]kshot run glyphs-protonet[/cyan]
    """,
)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_plugin.app, name="plugin")
cli_learn.add_commands(app)
cli_algorithms.add_commands(app)
cli_models.add_commands(app)
cli_serve.add_commands(app)

Recipe = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a recipe that comes along.", show_default=False),
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Single values to change.", show_default=False),
]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"kshot {version('kshot')}")
        raise typer.Exit


@app.callback()
def kshot(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def run(recipe: Recipe, changes: Changes = None) -> None:
    """Take images to a promoted model: data, meta-training, evaluation, ONNX, registry, gate.

    What has not changed since an earlier run is used again, and a run that was cut off goes on where it was:

    [cyan]kshot run glyphs-protonet[/cyan]

    [cyan]kshot run glyphs-protonet training.lr=0.01 evaluation.shots=[1,5][/cyan]

    [cyan]kshot run my-recipe.toml learner.name=maml[/cyan]
    """
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # the steps speak for themselves
    again = shlex.join(["kshot", "run", recipe, *(changes or [])])
    try:
        from kshot_flows import pipeline, report

        report.show(pipeline.run(recipe, changes or []), again)
    except KeyboardInterrupt:
        _stop(f"Stopped. What was finished is kept, and training goes on from its last checkpoint: {again}")


@app.command()
def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|KEY=VALUE",
            help="Recipes, and values to change in all of them; in quotes, a recipe with changes of its own.",
            show_default=False,
        ),
    ],
) -> None:
    """Set recipes side by side on the same test episodes: accuracy, paired differences, times, sizes.

    Each is trained, evaluated and exported, or used again where it is unchanged; nothing is registered.

    Differences are to the first of them:

    [cyan]kshot compare omniglot-protonet omniglot-maml[/cyan]

    [cyan]kshot compare glyphs-protonet "glyphs-protonet learner.name=maml" training.steps=300[/cyan]
    """
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    again = shlex.join(["kshot", "compare", *recipes])
    try:
        from kshot_flows import compare, report

        report.show_comparison(compare.run(recipes), again)
    except KeyboardInterrupt:
        _stop(f"Stopped. What was finished is kept, and training goes on from its last checkpoint: {again}")


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this one, to make your own of it.", show_default=False)
    ] = None,
) -> None:
    """List the recipes that come along, or print one.

    Make your own of one: [cyan]kshot recipes photos-finetune > my.toml[/cyan], and then [cyan]kshot run my.toml[/cyan]
    """
    from rich.console import Console

    from kshot_flows import shipped

    if name is not None:
        typer.echo(shipped.find(name).read_text(), nl=False)
        return
    listed, out = table("recipe", "what it is"), Console(markup=False, highlight=False)
    for each, path in shipped.recipes().items():
        listed.add_row(each, shipped.about(path))
    out.print(listed)
    ways = f"kshot recipes {each} > my.toml", f"cp {shlex.quote(str(path))} my.toml"
    out.print(f"Make your own of one: {', or '.join(ways)}", soft_wrap=True)


@app.command()
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
    from kshot_flows import schedules

    schedules.serve(recipe, changes or [], cron=cron, timezone=timezone)


def main() -> None:
    """The entry point: errors that are a user's to mend become a message, anything else stays a traceback."""
    # Threads of a math library that wait in a busy loop take the cores from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except KshotError as error:
        _complain(error)
        sys.exit(1)
    except KeyboardInterrupt:
        _stop("Stopped.")
    finally:
        gc.freeze()  # at exit Python looks through a million live objects for garbage, for two seconds


def _complain(error: KshotError) -> None:
    typer.secho(str(error), fg="red", err=True)


def _stop(message: str) -> None:
    typer.secho(f"\n{message}", err=True)
    sys.exit(130)
