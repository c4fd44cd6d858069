"""The `kshot` command line: its subcommands, and error messages instead of tracebacks."""

from __future__ import annotations

import difflib
import gc
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kshot_flows.cli import algorithms, data, learn, models, plugins, run, schedule, serve, upkeep
from kshot_flows.cli.errors import sentence
from kshot_flows.cli.run import stop

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
    "schedules",
    "models",
    "promote",
    "rollback",
    "history",
    "trace",
    "serve",
    "keys",
    "doctor",
    "gc",
)


class _Group(TyperGroup):
    """Lists commands in the order a new user needs them, and suggests the closest name for an unknown command."""

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

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:  # click takes it for Ctrl-D, and says "Aborted."
            raise ValueError("a file ended too early") from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Few-shot image classification, from versioned data to a served model.

    [bold]With your own photos[/bold], one folder per class, served on a web page:

    [cyan]kshot learn ./photos[/cyan]

    [cyan]kshot serve models:/photos@production --space ./photos[/cyan]

    [bold]Without photos[/bold], on generated images, in one to three minutes: [cyan]kshot run glyphs-protonet[/cyan]
    """,
)
app.add_typer(data.app, name="data")
app.add_typer(plugins.app, name="plugin")
run.add_commands(app)
learn.add_commands(app)
schedule.add_commands(app)
algorithms.add_commands(app)
models.add_commands(app)
serve.add_commands(app)
upkeep.add_commands(app)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"kshot {version('kshot')}")
        raise typer.Exit


@app.callback()
def kshot(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="KSHOT_DEBUG", help="Print tracebacks of errors.")] = False,
) -> None:
    if debug:
        os.environ["KSHOT_DEBUG"] = "1"


def main() -> None:
    """The entry point: prints an error as one message and exits with status 1; `--debug` adds the traceback."""
    # Idle OpenMP threads that spin would take CPU time from busy ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except KeyboardInterrupt:
        stop("Stopped.")
    except Exception as error:
        if os.environ.get("KSHOT_DEBUG", "0").lower() not in ("0", "false", ""):
            traceback.print_exc()
        typer.secho(sentence(error), fg="red", err=True)
        sys.exit(1)
    finally:
        gc.freeze()  # skips the garbage collection at exit, which takes two seconds on a million live objects
