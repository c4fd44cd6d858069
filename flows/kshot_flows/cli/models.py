"""The commands for the registry: models, promote, rollback, history, trace."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kshot_flows.console.tables import NARROW, console, table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from kshot_flows.registry import Audit

# MLflow takes seconds to import, and `kshot --help` must not wait for it: every command imports what it needs.

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The model's name, which is its recipe's.", show_default=False)
]
Number = Annotated[int, typer.Argument(metavar="VERSION", help="The version's number.", show_default=False)]
Why = Annotated[str, typer.Option(help="Reason, recorded in the audit log.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_VERSION = (
    "JSON fields of a version: name, version, stage (none, staging, production, archived), aliases, registered, "
    "accuracy and margin (shares of 1), gate (passed, failed, or null if not evaluated), gate_report, warnings, "
    "recipe, data, data_sha256, other_data_sha256, git_commit, git_dirty, mlflow_run, prefect_run, source, "
    "sha256 (by file)."
)
_MOVE = (
    "JSON fields of a move: number, when, version, from, to, archived (the version that it displaced), who, why, "
    "gate_report, rollback, adopted (true if made in MLflow), refused (why it did not count)."
)
_TIMES = "Times are ISO 8601."


def add_commands(app: typer.Typer) -> None:
    """Make these functions commands of `app`."""
    lists = "List models and their versions: stage, accuracy, data, date."
    moves = "List every stage change of a model's versions: who, when, why, from, to."
    traces = "Show the provenance of a version: data, code, recipe, runs, files, gate report, stage changes."
    helps: dict[Callable[..., None], str | None] = {
        models: f"{lists}\n\n{_VERSION} {_TIMES}",
        promote: None,
        rollback: None,
        history: f"{moves}\n\n{_MOVE} {_TIMES}",
        trace: f"{traces}\n\n{_VERSION} Its moves are in the field history. {_MOVE} {_TIMES}",
    }
    for command, text in helps.items():
        app.command(help=text)(command)


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show only this model.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    from kshot_flows import registry
    from kshot_flows.tracking import stores

    out = console(markup=False)
    names = registry.models() if name is None else [name]
    for each in names:
        _settle(each)
    found = {each: registry.versions(each) for each in names}
    if as_json:
        _print_json([version.to_dict() for versions in found.values() for version in versions])
        return
    if not names:
        out.print("No models yet. `kshot run` trains one and registers it.")
    for each, versions in found.items():
        listed = _titled(each, "version", "stage", "accuracy", "gate", "data", "registered", "other aliases")
        for version in versions:
            listed.add_row(
                str(version.version),
                version.stage,
                registry.accuracy(version.tags),
                version.tags.get("gate", ""),
                version.tags.get("data", "")[:12],
                registry.local_time(version.when)[:16],
                ", ".join(alias for alias in version.aliases if alias != version.stage.lower()),
            )
        out.print(listed)
        for version in versions:
            if version.stage == "Production" and (warnings := version.tags.get("gate.warnings")):
                out.print(f"Version {version.version} is in production; mind: it {warnings}", style="yellow")
    if names:
        out.print(f"in {stores.public(stores.uri())}", style="dim")


def promote(
    name: Name,
    version: Number,
    stage: Annotated[
        str, typer.Argument(metavar="STAGE", help="none, staging, production or archived.", show_default=False)
    ],
    why: Why = "",
    force: Annotated[
        bool,
        typer.Option("--force", help="Bypass the gate, or take the champion out of production; needs --why."),
    ] = False,
) -> None:
    """Move a version to a stage. Production requires a passed gate report, unless forced."""
    from kshot_flows import registry

    _settle(name, needed=True)
    try:
        _tell(registry.promote(name, version, stage, why=why or None, force=force))
    except registry.AlreadyThereError as error:
        typer.echo(str(error))


def rollback(name: Name, why: Why = "rolled back by hand") -> None:
    """Return production to the previous version."""
    from kshot_flows import registry

    _settle(name, needed=True)
    _tell(registry.rollback(name, why=why))


def history(
    name: Name,
    refused: Annotated[bool, typer.Option("--refused", help="Also show moves that lost to a concurrent one.")] = False,
    as_json: Json = False,
) -> None:
    from kshot_flows import registry

    _settle(name)
    entries = registry.history(name, refused=refused)
    if as_json:
        _print_json([entry.to_dict() for entry in entries])
    else:
        console(markup=False).print(_moves(name, entries) if entries else f"No version of {name} was ever moved.")


def trace(name: Name, version: Number, as_json: Json = False) -> None:
    from kshot_flows import registry

    _settle(name)
    found, out = registry.trace(name, version), console(markup=False)
    if as_json:
        _print_json({**found.version.to_dict(), "history": [entry.to_dict() for entry in found.history]})
        return
    facts = _titled(f"{name} version {version}", "", "", show_header=False)
    for what, value in found.facts.items():
        facts.add_row(what, value)
    out.print(facts)
    if found.history:
        out.print(_moves("its moves", found.history))


def _settle(name: str, *, needed: bool = False) -> None:
    """Reconcile audit log, stages and aliases, and report what disagreed on standard error (JSON stays clean)."""
    from kshot_flows import registry

    try:
        for sentence in registry.settle(name):
            typer.secho(sentence, fg="yellow", err=True)
    except registry.UnsettledError as error:
        if needed:
            raise
        for sentence in (*registry.disagreements(name), str(error)):
            typer.secho(sentence, fg="red", err=True)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _titled(title: str, *columns: str, show_header: bool = True) -> Table:
    made = table(
        *columns, title=title, title_justify="left", title_style="bold", show_header=show_header, padding=NARROW
    )
    for column in made.columns:  # in 80 columns there is room for these in one line, and for the reason beside them
        column.no_wrap = column.header in ("stage", "accuracy", "from", "to")
    return made


def _moves(title: str, entries: Sequence[Audit]) -> Table:
    from kshot_flows import registry

    moves = _titled(title, "when", "version", "from", "to", "archived", "who", "why")
    for entry in entries:
        why = f"{entry.why} (rollback)" if entry.rollback else entry.why
        moves.add_row(
            registry.local_time(entry.when),
            str(entry.version),
            entry.came_from,
            entry.stage,
            "" if entry.displaced is None else str(entry.displaced),
            entry.who,
            why if entry.refused is None else f"REFUSED: {entry.refused}",
        )
    return moves


def _tell(audit: Audit) -> None:
    """Print what a move changed."""
    emptied = audit.came_from == "Production" != audit.stage
    said = f"{audit.name}: version {audit.version} {audit.stage.said} now" + " and no longer in production" * emptied
    if audit.displaced is not None:
        said += f"; version {audit.displaced} is archived"
    if emptied:
        said += ". Nothing is in production: servers that run go on with the version that they have, new ones wait"
    typer.echo(f"{said}.")
