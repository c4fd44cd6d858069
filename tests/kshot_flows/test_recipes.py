"""The recipes that come along: complete, found by name, and part of what is installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kshot.recipe import Recipe
from kshot_flows import recipes
from kshot_flows.registry.gate import GateSettings
from kshot_runtime.errors import KshotError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", recipes.recipes())
def test_a_recipe_opens_with_its_command_and_says_what_it_is(name: str) -> None:
    path = recipes.recipes()[name]
    command = "learn ./photos" if name == "photos" else f"run {name}"
    assert path.read_text().startswith(f"# kshot {command}\n")
    assert len(recipes.about(path)) > 20


@pytest.mark.parametrize("name", recipes.recipes())
def test_a_recipe_is_valid_down_to_its_plugins_and_its_gate(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    GateSettings.of(recipe.gate)
    side = (3, 84, 84) if "imagenet" in name or name == "photos" else (1, 28, 28)
    for variant in recipe.variants():
        assert sum(parameter.numel() for parameter in variant.build(side).parameters()) > 1000


def test_the_recipes_of_the_first_issue_are_there() -> None:
    assert set(recipes.recipes()) >= {
        "glyphs-protonet", "omniglot-protonet", "omniglot-maml", "omniglot-finetune", "mini-imagenet-protonet",
    }  # fmt: skip


def test_a_recipe_is_found_by_its_path_too(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(recipes.recipes()["glyphs-protonet"].read_text())
    assert recipes.find(str(mine)) == mine


def test_a_misspelt_recipe_is_answered_with_a_guess() -> None:
    with pytest.raises(KshotError, match="'glyph-protonet'; did you mean 'glyphs-protonet'"):
        recipes.find("glyph-protonet")


def test_single_values_are_changed_by_key_and_value() -> None:
    recipe = recipes.load("glyphs-protonet", ["training.lr=0.01", "evaluation.shots=[1, 2]", "name=mine"])
    assert (recipe.training.lr, recipe.evaluation.shots, recipe.name) == (0.01, (1, 2), "mine")


@pytest.mark.parametrize("setting", ["training.lr", "training.lr=", "=3"])
def test_a_change_without_key_or_value_is_refused(setting: str) -> None:
    with pytest.raises(KshotError, match="key=value"):
        recipes.changes([setting])


def test_a_misspelt_key_is_answered_with_a_guess() -> None:
    with pytest.raises(KshotError, match=r"training\.stepps.*did you mean 'steps'"):
        recipes.load("glyphs-protonet", ["training.stepps=3"])


def test_a_misspelt_key_of_the_gate_is_told_before_anything_runs() -> None:
    with pytest.raises(KshotError, match=r"\[gate\]: unknown key 'margn'; did you mean 'margin'"):
        recipes.load("glyphs-protonet", ["gate.margn=0.1"])


def test_an_installed_kshot_has_the_recipes(tmp_path: Path) -> None:
    """The wheel holds them inside the package, where `recipes` looks first: run from the wheel itself, no checkout."""
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], capture_output=True, text=True
    )
    if built.returncode and "hatchling" in built.stdout + built.stderr and "No matching distribution" in built.stderr:
        pytest.skip("building needs hatchling, which cannot be fetched here")
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    listed = subprocess.run(
        [sys.executable, "-c", "from kshot_flows import recipes; print(recipes.__file__, *recipes.recipes().values())"],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
    module, *files = listed.stdout.split()
    assert Path(module).is_relative_to(tmp_path)
    assert sorted(Path(file).stem for file in files) == sorted(recipes.recipes())
    assert all(Path(file).is_relative_to(tmp_path) and Recipe.load(file) for file in files)
