"""Compare recipes: train, evaluate and export each, and compare them on the same test episodes.

Nothing is registered or promoted; a later `kshot run` reuses the results.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prefect import flow
from rich.markup import escape

from kshot.data.datasets import splits_of
from kshot.data.episodes import Shape, draw_indices
from kshot.recipe import Recipe
from kshot_flows import project, recipes
from kshot_flows.console import progress
from kshot_flows.report.standings import Comparison, Cost, Draw, Measured, Standing, Standings, shared
from kshot_flows.store import results
from kshot_flows.store.keys import TEST_SEED
from kshot_flows.store.products import Exported, Line, Scores
from kshot_flows.tasks import heads
from kshot_flows.tasks.data import version_data
from kshot_flows.tasks.evaluate import evaluate
from kshot_flows.tasks.export import export
from kshot_flows.tasks.train import meta_train
from kshot_flows.tracking import runs
from kshot_runtime.bundle import Bundle
from kshot_runtime.errors import KshotError

EXPERIMENT = "comparisons"  # MLflow's
_ROUNDS, _SECONDS = 25, 30.0  # of timing: so many, or fewer if they take long


@dataclass(frozen=True)
class Entrant:
    """A recipe with overrides, and its label."""

    label: str
    recipe: Recipe


@dataclass(frozen=True)
class Played:
    """The results of an entrant's steps."""

    entrant: Entrant
    scores: Scores
    bundle: Exported


@flow(name="kshot-compare", persist_result=False)
def comparison(asked: list[str]) -> Comparison:
    """Compare recipes, given by path or name, in one table and one picture."""
    taking_part = entrants(asked)
    shared_shapes(taking_part)
    played = [play(entrant) for entrant in taking_part]
    return record(asked, standings(played), played)


def play(entrant: Entrant) -> Played:
    """Run the pipeline's steps up to the bundle; unchanged steps are reused."""
    if not results.recalling():
        progress.say(f"\n[bold cyan]{escape(entrant.label)}[/bold cyan]")
    data = version_data(entrant.recipe)
    learner = meta_train(entrant.recipe, data)
    scores = evaluate(entrant.recipe, data, learner)
    return Played(entrant, scores, export(entrant.recipe, learner, scores))


def entrants(asked: Sequence[str]) -> list[Entrant]:
    """Parse arguments: `KEY=VALUE` overrides a value in all recipes, `"RECIPE KEY=VALUE"` in that one."""
    words = [_words(text) for text in asked]
    named = [word for word in words if "=" not in word[0] or Path(word[0]).is_file()]
    common = [text for text, word in zip(asked, words, strict=True) if word not in named]
    labels = [" ".join([Path(recipe).stem, *own]) for recipe, *own in named]
    if len(labels) < 2:
        raise KshotError(
            f"a comparison takes two recipes or more, and {len(labels) or 'none'} came. "
            'One and the same in two ways: kshot compare NAME "NAME learner.name=maml"'
        )
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise KshotError(f"{twice[0]!r} comes twice, with nothing that tells the two apart")
    return [
        Entrant(label, recipes.load(recipe, [*common, *own]))
        for label, (recipe, *own) in zip(labels, named, strict=True)
    ]


def _words(text: str) -> list[str]:
    try:
        return [text] if Path(text).is_file() or not text.strip() else shlex.split(text)
    except ValueError as error:
        raise KshotError(f"{text!r} cannot be read: {error}") from None


def shared_shapes(taking_part: Sequence[Entrant]) -> list[Shape]:
    """The episode shapes that all recipes share; an error if there are none, before anything is trained."""
    tested = [(_tested_on(one.recipe), one.recipe.evaluation.shapes) for one in taking_part]
    common = shared([shapes for _, shapes in tested])
    if common and all(classes == tested[0][0] for classes, _ in tested):
        return common
    lines = [
        f"  {one.label}: {classes}; {'; '.join(map(str, shapes))}"
        for one, (classes, shapes) in zip(taking_part, tested, strict=True)
    ]
    raise KshotError(
        "these recipes share no test episodes, so their figures cannot be compared:\n"
        + "\n".join(lines)
        + "\nGive them the same, with a change for all such as dataset.name=glyphs or evaluation.queries=15"
    )


def standings(played: Sequence[Played]) -> Standings:
    """Compare the entrants' results, and time their bundles."""
    if any(_episodes_of(one) != _episodes_of(played[0]) for one in played):
        raise KshotError(
            "the data changed while the recipes were played, or their folds or seeds differ where figures are "
            "cross-validated: their episodes are not the same. Give them one training.folds and seed; compare again."
        )
    lines = [_lines(one.scores) for one in played]
    draws = [draw for draw in lines[0] if all(draw in each for each in lines)]
    accuracies = [_accuracies(one.scores, each) for one, each in zip(played, lines, strict=True)]
    counts = {draw: min(len(each[draw]) for each in accuracies) for draw in draws}  # the first ones are the same
    with progress.busy("timing the bundles, in turns"):
        rounds, times = _times(played, draws[0].shape)
    rows = []
    for one, own, each, (adapt_ms, classify_ms) in zip(played, lines, accuracies, times, strict=True):
        measured = {
            draw: Measured.of(each[draw][:n], accuracies[0][draw][:n], own[draw].ece, own[draw].open_set)
            for draw, n in counts.items()
        }
        cost = Cost(adapt_ms, classify_ms, _parameters(one), sum(pin.file.stat().st_size for pin in one.bundle.files))
        rows.append(Standing(one.entrant.label, one.entrant.recipe.learner.one, measured, cost))
    return Standings(_tested_on(played[0].entrant.recipe), counts, tuple(rows), rounds)


def record(asked: Sequence[str], found: Standings, played: Sequence[Played]) -> Comparison:
    """Save the table and the picture in the project, and log both in one MLflow run."""
    from kshot_flows.report import pictures, standings_view

    folder = project.home() / "runs" / EXPERIMENT / hashlib.sha256(json.dumps(list(asked)).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(found.to_dict(), indent=2))
    picture = pictures.png(standings_view.picture(found))
    (folder / "comparison.png").write_bytes(picture)
    about = {
        f"{number}": {
            "recipe": one.entrant.label,
            "name": one.entrant.recipe.name,
            "training": one.scores.learner.learner.sha256,
            "training run": one.scores.learner.run,
        }
        for number, one in enumerate(played, 1)
    }
    own, *others = played[0].scores.data.refs(played[0].entrant.recipe.dataset)
    tags = {"mlflow.runName": ", ".join(row.label for row in found.rows)[:200]}
    with runs.run(EXPERIMENT, recipe=about, data=own, others=others, seed=TEST_SEED, tags=tags) as opened:
        opened.json("comparison", found.to_dict())
        opened.pictures({"comparison": picture})
        return Comparison(found, folder, opened.id)


def _tested_on(recipe: Recipe) -> str:
    """The classes that test episodes are drawn from."""
    own = recipe.dataset.name
    turned = " with quarter turns" if recipe.dataset.rotations else ""
    parts = splits_of(recipe.dataset.test, own).items()
    return " + ".join(f"{name}:{split}{turned if name == own else ''}" for name, split in parts)


def _episodes_of(played: Played) -> tuple[object, ...]:
    """Everything that determines the test episodes, except their shape."""
    scores, recipe = played.scores, played.entrant.recipe
    folds = (recipe.training.folds, recipe.seed) if heads.cross_validated(recipe) else None
    return scores.data.identity_of(scores.split), scores.data.split_of(scores.split), scores.seed, folds


def _lines(scores: Scores) -> dict[Draw, Line]:
    """The inductive results, which correspond to serving."""
    return {Draw(line.shape, line.protocol): line for line in scores.lines if not line.transductive}


def _accuracies(scores: Scores, lines: Mapping[Draw, Line]) -> dict[Draw, np.ndarray]:
    """The accuracy of every episode."""
    with np.load(scores.arrays.file) as arrays:
        return {draw: arrays[f"{line.key}.accuracies"] for draw, line in lines.items()}


def _times(played: Sequence[Played], shape: Shape) -> tuple[int, list[tuple[float, float]]]:
    """Milliseconds that each bundle takes to adapt and to classify one photo, on one thread of the CPU.

    The bundles alternate, so that other load affects all of them; medians over the rounds.
    """
    first = played[0]
    images = first.scores.data.classes(first.entrant.recipe.dataset.test)
    classes, samples = draw_indices(images, shape, 1, seed=TEST_SEED, step=0, stream="test")
    pixels = images.gather(classes[..., None], samples)[0]  # (ways, shots + queries, C, H, W)
    support, query = pixels[:, : shape.shots].reshape(-1, *images.shape), pixels[0, shape.shots :][:1]
    ways = np.arange(shape.ways)
    labels = ways.repeat(shape.shots)
    bundles = [Bundle.open(one.bundle.folder) for one in played]
    states = [bundle.adapt_arrays(support, labels, ways) for bundle in bundles]
    took: list[list[tuple[float, float]]] = []  # (rounds, bundles, adapting and classifying)
    began = time.monotonic()
    while len(took) < _ROUNDS and (len(took) < 3 or time.monotonic() - began < _SECONDS):
        took.append(
            [
                (
                    _milliseconds(lambda: bundle.adapt_arrays(support, labels, ways)),  # noqa: B023  (called at once)
                    _milliseconds(lambda: bundle.logits(state, query)),  # noqa: B023
                )
                for bundle, state in zip(bundles, states, strict=True)
            ]
        )
    medians = np.median(took, axis=0)  # (bundles, 2)
    return len(took), [(float(adapt), float(classify)) for adapt, classify in medians]


def _milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def _parameters(played: Played) -> int:
    """Number of the learner's parameters, without those that `prepare` adds for training."""
    learner = played.entrant.recipe.build(played.scores.data.open().rule.shape)
    return sum(parameter.numel() for parameter in learner.parameters())
