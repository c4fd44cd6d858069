"""The commands around the registry: models, promote, rollback, history, trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kshot_flows.console.tables import table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from kshot_flows.registry.stages import Audit

# MLflow takes seconds to import, and `kshot --help` must not wait for it: every command imports what it needs.

Name = Annotated[str, typer.Argument(metavar="NAME", help="The model's name: its recipe's.", show_default=False)]
Number = Annotated[int, typer.Argument(metavar="VERSION", help="The version's number.", show_default=False)]
Why = Annotated[str, typer.Option(help="The reason. It is kept with the move.", show_default=False)]


def add_commands(app: typer.Typer) -> None:
    """Make these functions commands of `app`."""
    for command in (models, promote, rollback, history, trace):
        app.command()(command)


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show only this model.", show_default=False)
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Finish moves that were interrupted.")] = False,
) -> None:
    """List models and their versions: stage, accuracy, data, when."""
    from rich.console import Console

    from kshot_flows import registry
    from kshot_flows.registry.stages import local_time
    from kshot_flows.tracking import stores

    out = Console(markup=False)
    names = registry.models() if name is None else [name]
    if not names:
        out.print("No models yet. `kshot run` trains one and registers it.")
    for each in names:
        if repair:
            registry.repair(each)
        listed = _titled(each, "version", "stage", "accuracy", "gate", "data", "registered")
        for version in registry.versions(each):
            listed.add_row(
                str(version.version),
                version.stage,
                registry.accuracy(version.tags),
                version.tags.get("gate", ""),
                version.tags.get("data", "")[:12],
                local_time(version.when)[:16],
            )
        out.print(listed)
        for version in registry.versions(each):
            if version.stage == "Production" and (warnings := version.tags.get("gate.warnings")):
                out.print(f"Version {version.version} is in production; mind: it {warnings}", style="yellow")
        wrong = registry.disagreements(each)
        for sentence in wrong:
            out.print(sentence, style="red")
        if wrong:
            out.print(
                f"A move was interrupted, or made by other means. `kshot models {each} --repair` follows the log."
            )
    if names:
        out.print(f"in {stores.public(stores.uri())}", style="dim")


def promote(
    name: Name,
    version: Number,
    stage: Annotated[
        str, typer.Argument(metavar="STAGE", help="none, staging, production or archived.", show_default=False)
    ],
    why: Why = "",
    force: Annotated[bool, typer.Option("--force", help="Pass by the gate; needs --why.")] = False,
) -> None:
    """Move a version to a stage. Into production only with a gate report that passed, unless forced."""
    from kshot_flows import registry

    _tell(registry.promote(name, version, stage, why=why or None, force=force))


def rollback(name: Name, why: Why = "rolled back by hand") -> None:
    """Give production back to the version that served before."""
    from kshot_flows import registry

    _tell(registry.rollback(name, why=why))


def history(
    name: Name,
    refused: Annotated[bool, typer.Option("--refused", help="Also show moves that came too late.")] = False,
) -> None:
    """List every move of a model's versions: who, when, why, from, to."""
    from rich.console import Console

    from kshot_flows import registry

    entries = registry.history(name, refused=refused)
    Console(markup=False).print(_moves(name, entries) if entries else f"No version of {name} was ever moved.")


def trace(name: Name, version: Number) -> None:
    """Show what led to a version: data, code, recipe, runs, files, gate, and its moves."""
    from rich.console import Console

    from kshot_flows import registry

    found, out = registry.trace(name, version), Console(markup=False)
    facts = _titled(f"{name} version {version}", "", "", show_header=False)
    for what, value in found.facts.items():
        facts.add_row(what, value)
    out.print(facts)
    if found.history:
        out.print(_moves("its moves", found.history))


def _titled(title: str, *columns: str, show_header: bool = True) -> Table:
    return table(*columns, title=title, title_justify="left", title_style="bold", show_header=show_header)


def _moves(title: str, entries: Sequence[Audit]) -> Table:
    from kshot_flows.registry.stages import local_time

    moves = _titled(title, "when", "version", "from", "to", "archived", "who", "why")
    for entry in entries:
        why = f"{entry.why} (rollback)" if entry.rollback else entry.why
        moves.add_row(
            local_time(entry.when),
            str(entry.version),
            entry.came_from,
            entry.stage,
            "" if entry.displaced is None else str(entry.displaced),
            entry.who,
            why if entry.refused is None else f"REFUSED: {entry.refused}",
        )
    return moves


def _tell(audit: Audit) -> None:
    away = f"; version {audit.displaced} went to the archive" if audit.displaced is not None else ""
    typer.echo(f"{audit.name}: version {audit.version} is in {audit.stage.lower()} now{away}.")
