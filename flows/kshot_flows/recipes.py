"""The bundled recipes, and loading any recipe by path or name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kshot_runtime.errors import KshotError

if TYPE_CHECKING:
    from kshot.recipe import Recipe

_INSTALLED = Path(__file__).parent / "recipes"  # in a wheel
_CHECKOUT = Path(__file__).parents[1] / "recipes"  # in a working copy


def recipes() -> dict[str, Path]:
    """The files of the bundled recipes, by name."""
    folder = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find(recipe: str) -> Path:
    """The file of a recipe, given its path or the name of a bundled one."""
    path = Path(recipe)
    if path.is_file():
        return path
    known = recipes()
    if recipe in known:
        return known[recipe]
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise KshotError(f"no recipe {recipe!r}{hint} A recipe is a TOML file or one of: {', '.join(known)}")


def about(path: Path) -> str:
    """A recipe's description: its first comment after the command."""
    comments = [line.lstrip("# ").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return next((line for line in comments if line and not line.startswith("kshot ")), "")


def changes(settings: Sequence[str]) -> Mapping[str, str]:
    """["training.lr=0.01"] -> {"training.lr": "0.01"}"""
    changed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (equals and key.strip() and value.strip()):
            raise KshotError(f"{setting!r} changes nothing; a change is written key=value, such as training.lr=0.01")
        changed[key.strip()] = value.strip()
    return changed


def load(recipe: str, settings: Sequence[str] = ()) -> Recipe:
    """A validated recipe, by path or name, with overrides applied."""
    from kshot.recipe import Recipe
    from kshot_flows import registry
    from kshot_flows.registry.gate import GateSettings

    found = Recipe.load(find(recipe), changes(settings))
    GateSettings.of(found.gate)
    registry.check_name(found.name)
    return _with_start(found)


def _with_start(recipe: Recipe) -> Recipe:
    """The recipe with `backbone.start` replaced by a file, if it names a registered version."""
    start = recipe.backbone.options.get("start") or ""
    if not start.startswith("models:/"):
        return recipe
    from kshot_flows import project, registry

    name, _, version = start.removeprefix("models:/").replace("@", "/").partition("/")
    if not (name and version):
        raise KshotError(
            f"[backbone] start = {start!r}: a registered version is models:/NAME/VERSION or models:/NAME@ALIAS"
        )
    file = registry.fetch_learner(name, version, project.home() / ".kshot" / "starts")
    options = {**recipe.backbone.options, "start": str(file)}
    return recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update=options)})
