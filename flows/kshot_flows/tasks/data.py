"""The task `version_data`: provides a recipe's data sets, records their versions, and checks for leakage."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape

from kshot.data.datasets import ClassImages, ImageSet
from kshot.data.episodes import Shape, check_shape
from kshot.recipe import Recipe
from kshot_flows.console import progress
from kshot_flows.data import versioning
from kshot_flows.report import artifacts
from kshot_flows.store import keys
from kshot_flows.store.products import DataVersion, Packed
from kshot_flows.store.results import RETRIED, task
from kshot_flows.tasks import heads
from kshot_runtime.errors import KshotError


@task(
    keys.version_data,
    shows=artifacts.publish,
    assets=lambda recipe: [f"kshot://data/{name}" for name in recipe.dataset.names],
    tags={"data"},
    **RETRIED,
)
def version_data(recipe: Recipe) -> DataVersion:
    """Provide all data sets of the recipe (imported or pulled if missing), verified and recorded in data.dvc."""
    root, found = versioning.data_root(), []
    for name in recipe.dataset.names:
        source = recipe.dataset.source if name == recipe.dataset.name else None
        with progress.counting(f"making {name}") as watch:
            present = versioning.ensure(name, root, source, watch)
        if present.note:
            progress.say(escape(f"  {present.note}"))
        found.append(present.data_set)
    if why := versioning.why_not_versioned(root):
        progress.say(escape(f"  {why}"))
    else:
        for line in versioning.record(root, *recipe.dataset.names).lines(root):
            progress.say(escape(f"  {line}"))
    own, *others = (
        Packed(packed.name, packed.version, packed.index.source, versioning.recorded(root, packed.name))
        for packed in found
    )
    data = DataVersion(own, tuple(others), recipe.dataset.rotations, recipe.dataset.protocol)
    _refuse_unlike(found)
    _refuse_seen(recipe, data)
    return data


def _refuse_unlike(found: Sequence[ImageSet]) -> None:
    own = found[0]
    for other in found[1:]:
        if other.rule.shape != own.rule.shape:
            raise KshotError(
                f"data set {other.name!r} holds images {other.rule.shape} and {own.name!r} {own.rule.shape}; those of "
                f"one recipe must be alike. Import one again: kshot data import SOURCE {other.name} "
                f"--size {own.rule.size} --channels {own.rule.channels} --replace"
            )


def _refuse_seen(recipe: Recipe, data: DataVersion) -> None:
    """Refuse test images that occur in other data sets used by the recipe; an import checks this within one."""
    for packed, splits in data.parts(recipe.dataset.test):
        tested = packed.open().hashes(splits)
        for setting in ("train", "validation", "unlabelled"):
            for other, seen in data.parts(getattr(recipe.dataset, setting)):
                if other != packed and (both := tested.keys() & other.open().hashes(seen).keys()):
                    raise KshotError(
                        f"{len(both)} of the {len(tested)} images of {packed.name}:{splits} in dataset.test are in "
                        f"{other.name}:{seen} of dataset.{setting} too, such as {min(tested[each] for each in both)}. "
                        "What is tested must be new to the learner: take other images for one of them."
                    )


def test_classes(recipe: Recipe, data: DataVersion) -> ClassImages:
    """The test classes; an error if the recipe's episodes cannot be drawn from them."""
    splits, training = recipe.dataset, recipe.training
    test = data.classes(splits.test)
    for shape in recipe.evaluation.shapes if not heads.cross_validated(recipe) else ():
        _fits(test, shape, splits.test, "evaluation.ways=[{}]", "evaluation.queries={}")
    if training.steps:
        validation, size = data.classes(splits.validation), training.validation_shape
        _fits(validation, size, splits.validation, "training.validation_ways={}", "training.validation_queries={}")
        for shape in training.shapes:
            _fits(data.classes(splits.train), shape, splits.train, "training.ways={}", "training.queries={}")
    return test


def _fits(images: ClassImages, shape: Shape, split: str, ways: str, queries: str) -> None:
    try:
        check_shape(images, shape, (ways, queries))
    except KshotError as error:
        raise KshotError(f"[{ways.partition('.')[0]}] asks for {shape} of {split!r}: {error}") from None
