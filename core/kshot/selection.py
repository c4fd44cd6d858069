"""Model selection: a head by cross-validation over classes, and the number of inner steps for each number of shots."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kshot.data.datasets import ClassImages
from kshot.data.embeddings import ClassFeatures, embedded
from kshot.data.episodes import Episode, Shape, Stream
from kshot.evaluation.calibration import Trial
from kshot.evaluation.scores import Score, drawn, evaluate, evaluating
from kshot.evaluation.statistics import interval
from kshot.learner import FeatureLearner, InnerLoop, Learner
from kshot.recipe import Recipe
from kshot_runtime.errors import KshotError


@dataclass(frozen=True)
class Tried:
    """A candidate: a learner with its settings, and its scores on classes that its statistics do not come from."""

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


def choose(tried: Sequence[Tried]) -> Tried:
    """The first candidate that is not clearly worse than the best, by the paired difference over all episodes.

    List candidates in order of preference: random differences between equals then do not decide.
    """

    def accuracies(one: Tried) -> np.ndarray:
        return np.concatenate([score.accuracies for score in one.scores])

    best = max(tried, key=lambda one: one.accuracy)
    gaps = (interval(accuracies(best) - accuracies(one)) for one in tried)
    return next(one for one, (mean, margin) in zip(tried, gaps, strict=True) if one is best or mean <= margin)


@torch.no_grad()
def choose_steps(
    learner: InnerLoop, classes: ClassImages, shapes: Sequence[Shape], episodes: int, *, seed: int, device: str = "cpu"
) -> dict[int, int]:
    """For each number of shots, the fewest inner steps that are not clearly worse than the best on validation episodes.

    Each episode is evaluated after every step up to `learner.most_steps`; `shapes` with equal shots are pooled.
    """
    images, found = embedded(learner, classes, device=device), dict[int, list[np.ndarray]]()
    with evaluating(learner):
        for shape in dict.fromkeys(fitting(shape, images) for shape in shapes):
            sampled = drawn(images, shape, episodes, seed=seed, stream="val", device=device)
            found.setdefault(shape.shots, []).extend(_accuracies_by_step(learner, episode) for episode in sampled)
    chosen = {}
    for shots, rows in sorted(found.items()):
        accuracies = np.stack(rows)  # (episodes, steps)
        best = accuracies[:, [accuracies.mean(0).argmax()]]
        gaps = [interval(gap) for gap in (best - accuracies).T]
        chosen[shots] = 1 + next(i for i, (mean, margin) in enumerate(gaps) if mean <= margin)
    return chosen


def _accuracies_by_step(learner: InnerLoop, episode: Episode) -> np.ndarray:
    """Accuracy (most_steps,) on the queries of an episode after 1, 2, ... `most_steps` inner steps."""
    given, accuracies = (episode.support, episode.support_labels, episode.classes), []
    for state in itertools.islice(learner.states(*given, learner.most_steps), 1, None):
        logits = learner.classify(learner.finish(state, *given), episode.query)
        accuracies.append((logits.argmax(1) == episode.query_labels).double().mean())
    return torch.stack(accuracies).cpu().numpy()


def held_out(classes: int, folds: int, seed: int) -> list[np.ndarray]:
    """The numbers of the classes that each fold holds out: at least 2, but not all, unless there is one fold only."""
    if folds == 1:
        return [np.arange(classes)]
    if classes < 3:
        raise KshotError(
            f"cross-validation over classes needs 3 classes, one to learn from and two to test on; there are {classes}"
        )
    order, size = np.random.default_rng(seed).permutation(classes), max(2, -(-classes // folds))
    starts = [fold * classes // folds for fold in range(min(folds, classes))]
    return [order[(start + np.arange(size)) % classes] for start in starts]


Fold = tuple[ClassImages, ClassImages]
"""Classes to learn statistics from, and classes to evaluate on."""


def folds_of(classes: ClassImages, folds: int, seed: int) -> list[Fold]:
    """The folds of a cross-validation over classes."""
    every = np.arange(len(classes))
    parts = held_out(len(classes), folds, seed)
    return [(classes.only(np.setdiff1d(every, out)), classes.only(out)) for out in parts]


def trials(learner: Learner, folds: Sequence[Fold]) -> list[Trial]:
    """For each fold, a copy of the learner with the statistics of its first classes, and the classes to evaluate on."""
    found: list[Trial] = []
    for known, new in folds:
        head = copy.deepcopy(learner, {id(learner.backbone): learner.backbone})
        if isinstance(head, FeatureLearner) and isinstance(known, ClassFeatures):
            head.learn_statistics(known.by_class)
        found.append((head, new))
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
    """Evaluate each learner with each of its open settings on the same episodes; `choose` selects one.

    `embedded` returns the base classes as features of a learner's backbone. The `episodes` are divided over the folds.
    """
    parts: dict[int, list[Fold]] = {}  # by backbone, which variants share
    for recipe, learner in variants:
        if id(learner.backbone) not in parts:
            parts[id(learner.backbone)] = folds_of(embedded(learner), folds, seed)
        for settings in learner.choices() if isinstance(learner, FeatureLearner) else [{}]:
            began = time.perf_counter()
            learner.config = learner.config.model_copy(update=settings)
            heads = trials(learner, parts[id(learner.backbone)])
            scores = [
                evaluate_folds(heads, shape, episodes, seed=seed, stream="val", device=device) for shape in shapes
            ]
            yield Tried(recipe, dict(settings), tuple(scores), time.perf_counter() - began)


def evaluate_folds(
    parts: Sequence[Trial], shape: Shape, episodes: int, *, seed: int, stream: Stream = "test", **options: Any
) -> Score:
    """One score over all folds, which share the episodes; see `evaluate`. Shapes are reduced to what a fold allows."""
    scores = [
        evaluate(learner, new, fitting(shape, new), max(2, episodes // len(parts)), seed=seed, stream=stream, **options)
        for learner, new in parts
    ]
    if len(scores) == 1:
        return scores[0]
    accuracies, confidences, right = (
        np.concatenate([getattr(score, name) for score in scores]) for name in ("accuracies", "confidences", "right")
    )
    seconds = sum(score.seconds for score in scores)
    return Score(scores[0].shape, accuracies, confidences, right, seconds, scores[0].transductive)


def fitting(shape: Shape, classes: ClassImages) -> Shape:
    """The shape, reduced to the number of classes and to the number of photos of the smallest class."""
    fewest = int(classes.counts.min())
    shots = max(1, min(shape.shots, fewest - 1))
    return Shape(min(shape.ways, len(classes)), shots, max(1, min(shape.queries, fewest - shots)))
