"""Choosing a head: learners, their open settings and kinds of features, compared by k folds over classes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kshot.calibration import Trial
from kshot.datasets import ClassImages
from kshot.embeddings import ClassFeatures
from kshot.episodes import Shape
from kshot.evaluation import Score, evaluate
from kshot.learner import FeatureLearner, Learner
from kshot.recipe import Recipe
from kshot_runtime.errors import KshotError


@dataclass(frozen=True)
class Tried:
    """A learner with its settings, and what it reached on classes that its statistics were not learned from."""

    recipe: Recipe
    settings: dict[str, Any]  # those that the recipe leaves open
    scores: tuple[Score, ...]  # for each shape of episode, over all folds
    seconds: float

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the shapes."""
        return float(np.mean([score.accuracy for score in self.scores]))

    def __str__(self) -> str:
        kind = self.recipe.backbone.options.get("features")
        settings = {**({"features": kind} if kind else {}), **self.settings}
        return " ".join([self.recipe.learner.one, *(f"{name}={value}" for name, value in settings.items())])


def held_out(classes: int, folds: int, seed: int) -> list[np.ndarray]:
    """For each fold the numbers of the classes that it holds out: at least 2 of them, and not all."""
    if classes < 3:
        raise KshotError(
            f"folds over classes need 3 classes, to learn from one and to test on two; there are {classes}"
        )
    order, each = np.random.default_rng(seed).permutation(classes), max(2, -(-classes // folds))
    starts = [fold * classes // folds for fold in range(min(folds, classes))]
    return [order[(start + np.arange(each)) % classes] for start in starts]


def trials(learner: Learner, classes: ClassImages, folds: int, seed: int) -> list[Trial]:
    """A learner beside classes that it has not learned from: for each fold a copy with the statistics of the others."""
    if not (isinstance(learner, FeatureLearner) and learner.closed_form and isinstance(classes, ClassFeatures)):
        return [(learner, classes)]
    found: list[Trial] = []
    for out in held_out(len(classes), folds, seed):
        head = copy.deepcopy(learner, {id(learner.backbone): learner.backbone})
        head.learn_statistics(classes.only(np.setdiff1d(np.arange(len(classes)), out)).class_by_class())
        found.append((head, classes.only(out)))
    return found


def select(
    variants: Sequence[tuple[Recipe, Learner]],
    embedded: Callable[[Learner], ClassImages],
    shapes: Sequence[Shape],
    *,
    folds: int,
    episodes: int,
    seed: int,
    device: str = "cpu",
) -> Iterator[Tried]:
    """Try each learner with each of its open settings on the same episodes; the highest `accuracy` is the choice.

    `embedded` gives the base classes as features of a learner's backbone. Each fold plays its share of the `episodes`.
    """
    for recipe, learner in variants:
        classes = embedded(learner)
        for settings in learner.choices() if isinstance(learner, FeatureLearner) else [{}]:
            began = time.perf_counter()
            learner.config = learner.config.model_copy(update=settings)
            parts = trials(learner, classes, folds, seed)
            each = max(2, episodes // len(parts))
            scores = [
                _joined([evaluate(head, some, _fitting(shape, some), each, seed=seed, stream="val", device=device)
                         for head, some in parts])
                for shape in shapes
            ]  # fmt: skip
            yield Tried(recipe, dict(settings), tuple(scores), time.perf_counter() - began)


def _fitting(shape: Shape, classes: ClassImages) -> Shape:
    """The shape with as many ways as there are classes, and as few queries as the smallest class has left."""
    spare = int(classes.counts.min()) - shape.shots
    return Shape(min(shape.ways, len(classes)), shape.shots, max(1, min(shape.queries, spare)))


def _joined(scores: Sequence[Score]) -> Score:
    """The scores of several folds as one."""
    accuracies, confidences, right = (
        np.concatenate([getattr(score, name) for score in scores]) for name in ("accuracies", "confidences", "right")
    )
    return Score(scores[0].shape, accuracies, confidences, right, sum(score.seconds for score in scores))
