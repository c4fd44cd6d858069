"""Evaluation on fixed, seeded episodes: accuracy with its 95 % interval, and calibration error."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kshot import malloc
from kshot.data.datasets import ClassImages
from kshot.data.embeddings import ClassFeatures, embedded
from kshot.data.episodes import Episode, Episodes, Shape, Stream, sample_episodes
from kshot.evaluation.statistics import calibration_error, interval
from kshot.learner import FeatureLearner, InnerLoop, Learner, State, over_episodes, without_statistics

AT_ONCE = 8  # episodes in a batch


@dataclass(frozen=True)
class Score:
    """Accuracy over episodes with its 95 % interval, and the calibration of the probabilities."""

    shape: Shape
    accuracies: np.ndarray  # (episodes,) share of correct queries
    confidences: np.ndarray  # (episodes * ways * queries,) probability of the predicted class
    right: np.ndarray  # (episodes * ways * queries,) bool: whether the prediction is correct
    seconds: float
    transductive: bool = False

    @property
    def episodes(self) -> int:
        return len(self.accuracies)

    @property
    def accuracy(self) -> float:
        return float(self.accuracies.mean())

    @property
    def margin(self) -> float:
        """Half the 95 % interval of the mean over episodes."""
        return interval(self.accuracies)[1]

    @property
    def ece(self) -> float:
        """Expected calibration error over 15 equal bins of confidence (Guo et al., 2017)."""
        return calibration_error(self.confidences, self.right)

    def __str__(self) -> str:
        how = "transductive" if self.transductive else "inductive"
        return (
            f"{100 * self.accuracy:.2f} ± {100 * self.margin:.2f} % "
            f"({self.shape}, {self.episodes} episodes, {how}, ECE {100 * self.ece:.1f} %)"
        )


def evaluate(
    learner: Learner,
    images: ClassImages,
    shape: Shape,
    episodes: int,
    *,
    seed: int,
    stream: Stream = "test",
    transductive: bool = False,
    temperature: float = 1.0,
    device: str = "cpu",
) -> Score:
    """Score a learner on `episodes` episodes, which (seed, stream) determine: all learners get the same ones.

    The learner runs in eval mode and without gradients. `transductive` normalises queries by their own batch
    (see `kshot.learner.without_statistics`).
    """
    started = time.perf_counter()
    found: list[tuple[Tensor, Tensor]] = []
    for batch, logits in _answered(
        learner, images, shape, episodes, seed=seed, stream=stream, transductive=transductive, device=device
    ):
        confidence, prediction = (logits / temperature).softmax(2).max(2)
        found.append((confidence.float(), prediction == batch[0].query_labels))
    confidences, right = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))  # (episodes, queries)
    seconds = time.perf_counter() - started
    return Score(shape, right.mean(1), confidences.flatten(), right.flatten(), seconds, transductive)


def answers(
    learner: Learner, images: ClassImages, shape: Shape, episodes: int, *, seed: int, device: str = "cpu"
) -> Iterator[tuple[Episode, Tensor]]:
    """Each test episode with the logits (ways * queries, ways) that the learner gives it.

    Episodes hold features in place of images if the learner takes them (see `kshot.data.embeddings`).
    """
    for batch, logits in _answered(
        learner, images, shape, episodes, seed=seed, stream="test", transductive=False, device=device
    ):
        yield from zip(batch, logits, strict=True)


@torch.no_grad()
def _answered(
    learner: Learner,
    images: ClassImages,
    shape: Shape,
    episodes: int,
    *,
    seed: int,
    stream: Stream,
    transductive: bool,
    device: str,
) -> Iterator[tuple[Episodes, Tensor]]:
    """Batches of evaluation episodes with their logits (E, ways * queries, ways)."""
    images = embedded(learner, images, device=device)
    draws = episodes * shape.ways * (shape.shots + shape.queries)
    if isinstance(images, ClassFeatures) and not images.backbone.mirrors and draws > 4 * images.counts.sum():
        images.complete()  # nearly all images will be drawn; embedding them first avoids many small passes
    with evaluating(learner, transductive=transductive), malloc.kept():
        for batch in batches(images, shape, episodes, seed=seed, stream=stream, device=device):
            support, first = batch.support, batch[0]
            found = answer(
                learner, support, first.support_labels, batch.query, first.classes, transductive=transductive
            )
            yield batch, found["logits"]


def answer(
    learner: Learner,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    classes: Tensor,
    *,
    transductive: bool = False,
    evidence: bool = False,
) -> State:
    """The `logits` (E, Q, W) of the queries of E episodes with the same labels; if asked, also `evidence` (E, Q).

    `support` (E, S, ...) and `query` (E, Q, ...) are images or features; heads on features run all episodes at once.
    """

    def one(support: Tensor, query: Tensor) -> State:
        if transductive and isinstance(learner, InnerLoop):
            state = learner.adapt(support, labels, classes, finish=False)
        else:
            state = learner.adapt(support, labels, classes)
        if transductive:
            state = without_statistics(state)
        if not (evidence and isinstance(learner, FeatureLearner)):
            return {"logits": learner.classify(state, query)}
        features = learner.embed(query, state)  # once: `classify` also takes features
        return {"logits": learner.classify(state, features), **learner.evidence(state, features)}

    features = isinstance(learner, FeatureLearner) and learner.batched and support.dim() == 3
    return over_episodes(one, support, query, together=features or learner.together(support))


def drawn(
    images: ClassImages, shape: Shape, episodes: int, *, seed: int, stream: Stream = "test", device: str = "cpu"
) -> Iterator[Episode]:
    """The evaluation's episodes, one by one, of images or of their features."""
    for batch in batches(images, shape, episodes, seed=seed, stream=stream, device=device):
        yield from batch


def batches(
    images: ClassImages, shape: Shape, episodes: int, *, seed: int, stream: Stream, device: str
) -> Iterator[Episodes]:
    """The evaluation's episodes in batches of `AT_ONCE`, of images or of their features."""
    for step in range(math.ceil(episodes / AT_ONCE)):
        batch = sample_episodes(images, shape, AT_ONCE, seed=seed, step=step, stream=stream).to(device)
        yield batch.part(0, episodes - step * AT_ONCE)


@contextmanager
def evaluating(learner: Learner, *, transductive: bool = False) -> Iterator[None]:
    """Put the learner in eval mode inside the block."""
    was_training = learner.training
    learner.eval().transductive = transductive
    try:
        yield
    finally:
        learner.train(was_training).transductive = False
