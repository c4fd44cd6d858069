"""The command `algorithms`: lists installed algorithms, and describes one: idea, paper, settings, accuracy."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from inspect import cleandoc
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from kshot_flows.console.tables import console, table

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo
    from rich.table import Table
    from rich.text import Text

    from kshot.plugins import Found, Provided

# Plugins bring torch, which takes seconds to import, and `kshot --help` must not wait for it.


def add_commands(app: typer.Typer) -> None:
    app.command()(algorithms)


def algorithms(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Describe this one.", show_default=False)] = None,
) -> None:
    """List the installed algorithms and backbones, or describe one: idea, paper, settings, accuracy.

    [cyan]kshot algorithms[/cyan]

    [cyan]kshot algorithms maml[/cyan]
    """

    from kshot import plugins

    out, found = console(), plugins.find()
    for part in _list(found) if name is None else _explain(name, found):
        out.print(part)


def _list(found: Found) -> Iterator[Any]:
    from rich.markup import escape

    for kind, title in (("learners", "algorithm"), ("backbones", "backbone")):
        listed = table(title, "from", "version", "idea")
        for one in found.of(kind):
            listed.add_row(one.name, one.distribution, one.version, escape(_paragraphs(_module(one.value))[0]))
        if kind == "learners":
            for broken in found.broken:
                listed.add_row(
                    f"[red]{broken.plugin}[/red]",
                    broken.distribution,
                    broken.version,
                    f"[red]broken:[/red] {escape(broken.reason)}",
                )
        yield listed
    yield "[dim]About one of them: kshot algorithms NAME. To add one: kshot plugin new, docs/plugins.md[/dim]"


def _explain(name: str, found: Found) -> Iterator[Any]:
    kind = "backbone" if name in {one.name for one in found.of("backbones")} else "learner"
    one = found.backbone(name) if kind == "backbone" else found.learner(name)
    yield f"[bold]{name}[/bold]  [dim]{one.distribution} {one.version}, plugin {one.plugin}[/dim]\n"
    yield from _about(one)
    yield _table(one, kind)
    if kind == "learner":
        yield from _figures(name)
        if recipes := recipes_of(name):
            yield f"Recipes that use it: {', '.join(recipes)}"


def _about(one: Provided) -> Iterator[Text]:
    from rich.text import Text

    for paragraph in about(one):
        text = Text(f"{paragraph}\n")
        text.highlight_regex(r"https?://\S+[^\s.,)]", "cyan")
        text.highlight_regex(r"^Good for", "bold green")
        yield text


def about(one: Provided) -> list[str]:
    """Paragraphs of the module's docstring (idea, paper), then of the class's; "Good for" comes last."""
    told = [*_paragraphs(_module(one.value)), *_paragraphs(one.value.__doc__ or "")]
    return sorted(dict.fromkeys(told), key=lambda paragraph: paragraph.startswith("Good for"))


def _module(value: type) -> str:
    """The docstring of a plugin's module, or of its class if the module has none."""
    return sys.modules[value.__module__].__doc__ or value.__doc__ or "(it says nothing of itself)"


def _paragraphs(text: str) -> list[str]:
    """A docstring's paragraphs, each unwrapped to one line; indented text and lists keep their lines."""
    parts = re.split(r"\n\s*\n", cleandoc(text).strip())
    return [
        part if re.search(r"^(\s|[-*] )|\S {3,}\S", part, re.MULTILINE) else " ".join(part.split()) for part in parts
    ]


def _table(one: Provided, section: str) -> Table:
    from rich.markup import escape

    shown = table(escape(f"[{section}]"), "default", "takes", "what it does")
    shown.columns[0].no_wrap = shown.columns[1].no_wrap = True
    shown.columns[2].max_width = 22
    for name, *rest in settings(one.value.Config):
        shown.add_row(name, *map(escape, rest))
    return shown


def settings(config: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Name, default, allowed values and description of each setting."""
    for name, field in config.model_fields.items():
        # A field that only changes the default of an inherited one means what that one means.
        fields = (getattr(kind, "model_fields", {}) for kind in config.__mro__)
        same = (of_kind[name] for of_kind in fields if name in of_kind)
        described = next((one.description for one in same if one.description), "")
        yield name, _default(field), takes(field.annotation, field.metadata), described


def _default(field: FieldInfo) -> str:
    """A value as written in a TOML recipe."""
    if field.is_required():
        return "(needed)"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "unset" if value is None else json.dumps(value, default=str, ensure_ascii=False)


def takes(annotation: Any, constraints: list[Any]) -> str:
    """Allowed values of a setting in words: `int, 1 to 4`, `number > 0 or unset`, `"pool" or "stride"`."""
    parts = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        own = [inner for given in annotation.__metadata__ for inner in (given, *getattr(given, "metadata", ()))]
        return takes(parts[0], [*constraints, *own])
    if get_origin(annotation) is Literal:
        return _either([json.dumps(part) for part in parts])
    if type(None) in parts:
        return f"{_either([takes(part, constraints) for part in parts if part is not type(None)])} or unset"
    if get_origin(annotation) in (tuple, list):
        return f"list of {takes(parts[0], [])}"
    if get_origin(annotation) is dict:
        return f"table of {takes(parts[1], [])} by {takes(parts[0], [])}"
    if parts:
        return _either([takes(part, constraints) for part in parts])
    names = {bool: "true or false", int: "int", float: "number", str: "text"}
    return f"{names.get(annotation, getattr(annotation, '__name__', str(annotation)))}{_range(constraints)}"


def _range(constraints: list[Any]) -> str:
    """Pydantic's constraints in words: ` > 0`, `, 1 to 4`, ` ≥ 0 and < 1`."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "multiple_of": "a multiple of"}
    limits = {
        name: getattr(given, name) for given in constraints for name in signs if getattr(given, name, None) is not None
    }
    if {"ge", "le"} <= limits.keys():
        return f", {limits['ge']:g} to {limits['le']:g}"
    said = [f"{sign} {limits[name]:g}" for name, sign in signs.items() if name in limits]
    return f" {' and '.join(said)}" if said else ""


def _either(choices: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))


def _figures(learner: str) -> Iterator[Any]:
    """Committed accuracies of an algorithm beside published ones, one table per training."""
    from rich.markup import escape

    from kshot_flows.report import figures

    rows = list(figures.load().rows(learner=learner))
    for run, of_run in groupby(rows, key=lambda row: row.run):
        columns = ["accuracy in %", *(["transductive"] if run.transductive else []), "published", "difference"]
        compared = table(run.data if run.method == learner else f"{run.method}: {run.data}", *columns)
        for row in of_run:
            transductive = [str(row.transductive or "")] if run.transductive else []
            published = row.paper.show(row.shape) if row.paper else ""
            compared.add_row(figures.words(row.shape), str(row.ours), *transductive, published, row.verdict)
        yield compared
        yield f"{run.trained}; {run.episodes:,} test episodes\n[cyan]{escape(run.command)}[/cyan]\n"
    if any(row.paper for row in rows):
        yield (
            "[dim]t: with the statistics of the queries' batch. ?: from memory. ✓, ✗: within the pass mark, or not. "
            "All figures: docs/results.md[/dim]\n"
        )


def recipes_of(learner: str) -> list[str]:
    """The bundled recipes that use an algorithm."""
    from kshot_flows import recipes

    files = {name: tomllib.loads(path.read_text()) for name, path in recipes.recipes().items()}
    return [name for name, content in files.items() if content["learner"]["name"] == learner]
