"""Add the results of a finished `kshot run` to the committed figures, and regenerate the tables of docs/results.md.

    python bench/record_figures.py PROJECT RECIPE [KEY=VALUE...] [--memory 1.7]

PROJECT is the project folder of the run; recipe and overrides are those of its command. A row of the same
method on the same data is replaced.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kshot.data.datasets import splits_of
from kshot.recipe import LearnerSettings, Recipe
from kshot.training import Training
from kshot_flows import recipes
from kshot_flows.report import figures
from kshot_flows.report.figures import Figure, Run, Trust
from kshot_flows.store import keys, learners
from kshot_runtime.errors import KshotError


def main() -> None:
    try:
        run = found(arguments())
    except KshotError as error:
        raise SystemExit(str(error)) from None
    figures.save(figures.load().with_run(run))
    print(run.model_dump_json(indent=2))

    import results_table

    results_table.main()


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("project", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--memory", type=float, metavar="GB", help="largest resident set of the whole command")
    parser.add_argument("--machine", default="", help="if not the one that docs/results.md names")
    parser.add_argument("--method", help="name of the row; else the recipe's, without its data set: 'fomaml'")
    parser.add_argument("--note", help="behind how it was trained")
    return parser.parse_args(given)


def found(asked: argparse.Namespace) -> Run:
    """The finished run of a recipe with these overrides in a project."""
    recipe = recipes.load(asked.recipe, asked.changes)
    folder, made = _made(asked.project, recipe)
    scores = _scores(folder, recipe)
    last = torch.load(folder / "last.pt", weights_only=True, map_location="cpu") if recipe.training.steps else {}
    return Run(
        method=asked.method or recipe.name.removeprefix(f"{recipe.dataset.name}-"),
        data=_data(recipe),
        learner=made.learner.one,
        command=shlex.join(["kshot", "run", asked.recipe, *asked.changes]),
        trained=", ".join(filter(None, [_trained(recipe, last), asked.note])),
        minutes=round(last["seconds"] / 60) if last else None,
        memory_gb=asked.memory,
        machine=asked.machine,
        recorded=_now(),
        episodes=recipe.evaluation.episodes,
        inductive=_figures(scores, transductive=False),
        transductive=_figures(scores, transductive=True),
        trust=_trust(scores),
    )


def _now() -> str:
    """The commit of the code, and today's date."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return f"{commit}, {time.strftime('%Y-%m-%d')}"


def _data(recipe: Recipe) -> str:
    """The table's name: the training data set, and the test data set if it differs."""
    tested = [name for name in splits_of(recipe.dataset.test, recipe.dataset.name) if name != recipe.dataset.name]
    return " to ".join([recipe.dataset.name, *tested])


def _made(project: Path, recipe: Recipe) -> tuple[Path, Recipe]:
    """The folder of the training, and its resolved recipe with one learner and all settings.

    Found by content, since the folder's name also depends on a hash of code that may have changed since.
    """
    wanted = _training(recipe)
    places = sorted(project.glob(f"runs/{recipe.name}/*/learner.pt"), key=lambda file: file.stat().st_mtime)
    for file in reversed(places):
        made = learners.recipe(file)
        if any(_training(one) == _training(made) for one in _candidates(recipe, made)):
            return file.parent, made
    raise KshotError(f"of {len(places)} trainings in {project}/runs/{recipe.name}, none is of this recipe: {wanted}")


def _candidates(recipe: Recipe, made: Recipe) -> list[Recipe]:
    """The recipe, or, if it leaves a selection to validation, each candidate with its selected settings."""
    found = {**made.learner.options, "name": made.learner.name}
    if recipe.training.steps:  # a training selects only the inner steps by shots
        found = {name: value for name, value in found.items() if name == "eval_steps"}
    return [
        one.model_copy(update={"learner": LearnerSettings(**{**found, **one.learner.model_dump()})})
        for one in recipe.variants()
    ]


def _training(recipe: Recipe) -> dict[str, Any]:
    return {**keys.training_part(recipe), "data": recipe.dataset.name}


def _scores(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """The newest scores in the folder on the recipe's test episodes, in its protocol."""
    shapes = {(shape.ways, shape.shots, shape.queries) for shape in recipe.evaluation.shapes}
    for file in sorted(folder.glob("scores-*.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        lines: list[dict[str, Any]] = json.loads(file.read_text())["lines"]
        tested = {tuple(line["shape"][key] for key in ("ways", "shots", "queries")) for line in lines}
        if tested == shapes and lines[0]["episodes"] == recipe.evaluation.episodes:
            return [line for line in lines if line["protocol"] == lines[0]["protocol"]]
    raise KshotError(f"{folder} holds no scores of these test episodes ({recipe.evaluation}); is the run finished?")


def _figures(lines: list[dict[str, Any]], *, transductive: bool) -> dict[str, Figure]:
    return {
        _name(line): Figure(round(100 * line["accuracy"], 2), round(100 * line["margin"], 2))
        for line in sorted(lines, key=lambda line: (line["shape"]["ways"], line["shape"]["shots"]))
        if line["transductive"] == transductive
    }


def _trust(lines: list[dict[str, Any]]) -> dict[str, Trust]:
    names = ("auroc", "false_accepts", "accepted")
    return {
        _name(line): Trust(
            round(100 * line["ece"], 1),
            *(round(100 * line["open_set"][name], 1) if line.get("open_set") else None for name in names),
        )
        for line in lines
        if not line["transductive"]
    }


def _name(line: dict[str, Any]) -> str:
    return f"{line['shape']['ways']}w{line['shape']['shots']}s"


def _trained(recipe: Recipe, last: dict[str, Any]) -> str:
    how, steps = recipe.training, last.get("step", 0)
    if steps == 0:
        return "not meta-trained"
    if any(name.split(".")[0] == "base" for name in last["learner"]):  # a head over all base classes: class training
        images = how.ways * (how.shapes[0].shots + how.queries) * how.episodes_per_step
        before = min(steps, recipe.learner.options.get("pretrain", steps))
        classes = f"{before:,} batches of {images} images"
        return classes if before == steps else f"{classes}, then {_episodes(how, steps - before)}"
    return _episodes(how, steps)


def _episodes(how: Training, steps: int) -> str:
    batches = f"batches of {how.episodes_per_step} episodes" if how.episodes_per_step > 1 else "episodes"
    queries = "1 query" if how.queries == 1 else f"{how.queries} queries"
    counts = Counter(shape.shots for shape in how.shapes)
    shots = " and ".join(f"{count} times {shots}" if count > 1 else str(shots) for shots, count in counts.items())
    return f"{how.ways}-way {shots}-shot, {queries}, {steps:,} {batches}"


if __name__ == "__main__":
    main()
