"""Calibration on validation episodes: a temperature for the probabilities, and thresholds for unknown queries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kshot import malloc
from kshot.data.datasets import ClassImages
from kshot.data.embeddings import embedded
from kshot.data.episodes import Shape, Stream, sample_episodes
from kshot.evaluation.scores import AT_ONCE, answer, evaluating
from kshot.evaluation.statistics import auroc, calibration_error, fit_temperature
from kshot.learner import Learner
from kshot_runtime.bundle import evidence
from kshot_runtime.manifest import By

ACCEPTED = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.995)  # of known queries, at other thresholds

_MIN_CLASSES = 8  # to fit a temperature to a learner whose statistics come from the validation classes

Trial = tuple[Learner, ClassImages]
"""A learner, and classes that it was not trained on."""


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold, and the shares of known and of unknown queries that pass it."""

    accepted: float
    threshold: float
    false_accepts: float  # NaN if there were no unknown classes


@dataclass(frozen=True)
class Calibration:
    """Temperature and threshold for episodes of one shape. Queries that score below the threshold are unknown."""

    shape: Shape
    temperature: float  # divide logits by this before the softmax
    by: By  # the score that is compared with the threshold
    threshold: float  # of equal error: known queries that fail and unknown ones that pass have the same share
    accepted: float  # share of known queries that pass it
    false_accepts: float  # share of unknown queries that pass it
    auroc: float  # of that score, for known against unknown queries
    ece: float  # of the probabilities at this temperature
    episodes: int
    points: tuple[OperatingPoint, ...] = ()  # other thresholds, from lenient to strict


def calibrate(
    trials: Sequence[Trial],
    shape: Shape,
    episodes: int,
    *,
    seed: int,
    by: By | None = None,
    seen: Trial | None = None,
    device: str = "cpu",
) -> Calibration:
    """Fit temperature and threshold on `episodes` validation episodes with known and unknown classes.

    An episode has as many unknown classes as its split allows, up to `shape.ways`, whose images are queries only.
    Several trials, such as the folds of a cross-validation, share the episodes. The threshold is on the score with the
    best AUROC, or on the score `by`.

    `seen` is for a learner whose statistics come from all validation classes; the trials then hold folds, with
    statistics of fewer classes. It is over-confident on classes that it has seen, and the trials are under-confident:
    the temperature is the geometric mean of both fits, and a threshold their mean; shares are those of the trials. With
    fewer than 8 classes the temperature is 1.
    """
    parts = [
        known_and_unknown(learner, images, shape, math.ceil(episodes / len(trials)), seed, "calibration", device)
        for learner, images in trials
    ]
    known, unknown = concatenated(part[0] for part in parts), concatenated(part[1] for part in parts)
    labels = np.concatenate([part[2] for part in parts])
    temperature = fit_temperature(known["logits"], labels)
    within = known_and_unknown(*seen, shape, episodes, seed, "calibration", device) if seen else None
    if within and seen:
        enough = len(seen[1]) >= _MIN_CLASSES
        temperature = math.sqrt(temperature * fit_temperature(within[0]["logits"], within[2])) if enough else 1.0
    probabilities = (torch.from_numpy(known["logits"]) / temperature).softmax(1).numpy()
    right = probabilities.argmax(1) == labels
    scores: dict[By, tuple[np.ndarray, np.ndarray]] = {
        name: (evidence(known, name, temperature), evidence(unknown, name, temperature))
        for name in ([by] if by else scores_of(known))
    }
    areas = {name: auroc(*pair) if len(pair[1]) else math.nan for name, pair in scores.items()}
    best = max(areas, key=lambda name: -1 if math.isnan(areas[name]) else areas[name])
    inside, outside = scores[best]
    points = [_balanced(inside, outside), *(operating_point(share, inside, outside) for share in ACCEPTED[::-1])]
    if within:
        sides = [evidence(side, best, temperature) for side in within[:2]]
        others = [_balanced(*sides), *(operating_point(share, *sides) for share in ACCEPTED[::-1])]
        points = [replace(p, threshold=(p.threshold + q.threshold) / 2) for p, q in zip(points, others, strict=True)]
    usual, *chosen = points
    return Calibration(
        shape, temperature, best, usual.threshold, usual.accepted, usual.false_accepts, areas[best],
        calibration_error(probabilities.max(1), right), episodes, tuple(chosen),
    )  # fmt: skip


def operating_point(accepted: float, known: np.ndarray, unknown: np.ndarray) -> OperatingPoint:
    """The threshold that the share `accepted` of the known scores passes."""
    threshold = float(np.quantile(known, 1 - accepted))
    return OperatingPoint(accepted, threshold, float((unknown >= threshold).mean()) if len(unknown) else math.nan)


def _balanced(known: np.ndarray, unknown: np.ndarray) -> OperatingPoint:
    """The threshold of equal error: of the known queries, the share fails that passes of the unknown ones."""
    if not len(unknown):
        return operating_point(0.95, known, unknown)
    shares = np.linspace(0, 1, 1001)
    fail, passing = np.quantile(known, shares), np.quantile(unknown, 1 - shares)  # thresholds for these shares
    share = int(np.argmin(np.abs(fail - passing)))
    threshold = float((fail[share] + passing[share]) / 2)
    return OperatingPoint(float((known >= threshold).mean()), threshold, float((unknown >= threshold).mean()))


def scores_of(answers: Mapping[str, np.ndarray]) -> list[By]:
    """The scores for unknown queries that can be computed from these results."""
    given: tuple[By, ...] = ("ratio", "nearest")
    return ["logit", "probability", "energy", *(name for name in given if name in answers)]


@torch.no_grad()
def known_and_unknown(
    learner: Learner, images: ClassImages, shape: Shape, episodes: int, seed: int, stream: Stream, device: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """The results of `answer` for known queries (N, ...) and unknown ones (M, ...), and the known ones' labels (N,).

    An episode has as many unknown classes as there are, up to its ways; their images are queries only.
    """
    unknown = min(shape.ways, len(images) - shape.ways)
    both = Shape(shape.ways + unknown, shape.shots, shape.queries)
    images = embedded(learner, images, device=device)
    answers: list[dict[str, np.ndarray]] = []
    with evaluating(learner), malloc.kept():
        for start in range(0, episodes, AT_ONCE):
            batch = sample_episodes(images, both, AT_ONCE, seed=seed, step=start, stream=stream).to(device)
            batch = batch.part(0, episodes - start)
            first, known = batch[0], shape.ways * shape.shots  # support comes class by class
            found = answer(
                learner, batch.support[:, :known], first.support_labels[:known], batch.query,
                first.classes[: shape.ways], evidence=True,
            )  # fmt: skip
            answers.append({name: value.cpu().numpy() for name, value in found.items()})
    every, known = concatenated(answers), shape.ways * shape.queries  # (episodes, queries, ...)
    inside, outside = (
        {name: value[:, part].reshape(-1, *value.shape[2:]) for name, value in every.items()}
        for part in (slice(known), slice(known, None))
    )
    return inside, outside, np.tile(np.arange(shape.ways).repeat(shape.queries), len(every["logits"]))


def concatenated(parts: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of several dicts, concatenated by name."""
    first, *others = parts
    return {name: np.concatenate([value, *(part[name] for part in others)]) for name, value in first.items()}
