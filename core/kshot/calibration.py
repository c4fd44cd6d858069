"""How far to trust a learner, from validation episodes: a temperature, thresholds for "none of these", and when two
images show one class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from kshot.datasets import ClassImages
from kshot.episodes import Shape, Stream
from kshot.features import evaluating
from kshot.learner import Learner
from kshot.norms import BY_ITSELF

KNOWN_ACCEPTED = 0.95  # share of known queries that the threshold lets pass, unless someone chooses another
ACCEPTED = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.995)  # the shares to choose from


Similarity = Literal["logit", "cosine", "distance"]


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold does: the share of known queries that pass it, and of unknown ones."""

    accepted: float
    threshold: float
    false_accepts: float  # NaN where there were no unknown classes to try


@dataclass(frozen=True)
class Calibration:
    """How to read the logits of one shape of episode. A query under the threshold belongs to none of the classes."""

    shape: Shape
    temperature: float  # divide logits by this before the softmax
    by: Literal["logit", "probability"]  # what is compared with the threshold: the largest logit or probability
    threshold: float
    auroc: float  # of telling known from unknown classes by that
    false_accepts: float  # share of unknown queries that pass where 95 % of the known do
    ece: float  # of the probabilities at this temperature
    episodes: int
    points: tuple[OperatingPoint, ...] = ()  # other thresholds, from lenient to strict


@dataclass(frozen=True)
class OpenSet:
    """What a threshold from validation classes does on test episodes that hold as many unknown classes as known."""

    accepted: float  # share of known queries that pass; 95 % of those on validation did
    false_accepts: float  # share of unknown queries that pass
    auroc: float  # of telling known from unknown classes, at any threshold
    episodes: int


@dataclass(frozen=True)
class Verification:
    """How to tell from two images whether they show one class: sigmoid(slope * similarity + offset)."""

    by: Similarity  # see `similarities`
    slope: float
    offset: float
    auroc: float  # of telling same from different pairs
    accuracy: float  # share of pairs on the right side of one half, as many same as different
    pairs: int


def calibrate(
    learner: Learner, images: ClassImages, shape: Shape, episodes: int, *, seed: int, device: str = "cpu"
) -> Calibration:
    """Fit temperature and threshold on `episodes` validation episodes, each with unknown classes beside the known.

    An episode has as many unknown classes as the split allows, up to `shape.ways`: their images are queries only.
    The threshold is on the largest logit or the largest probability, whichever separates better.
    """
    known_logits, unknown_logits, labels = _answers(learner, images, shape, episodes, seed, "calibration", device)
    temperature = fit_temperature(known_logits, labels)
    probabilities = (torch.from_numpy(known_logits) / temperature).softmax(1).numpy()
    right = probabilities.argmax(1) == labels
    best: tuple[float, Literal["logit", "probability"], np.ndarray, np.ndarray] | None = None
    for by in ("logit", "probability"):
        known, strange = (_evidence(logits, by, temperature) for logits in (known_logits, unknown_logits))
        area = auroc(known, strange) if len(strange) else math.nan
        if best is None or area > best[0]:
            best = area, by, known, strange
    assert best is not None
    area, by, known, strange = best
    points = tuple(_operating_point(share, known, strange) for share in sorted(ACCEPTED, reverse=True))
    usual = _operating_point(KNOWN_ACCEPTED, known, strange)
    return Calibration(
        shape,
        temperature,
        by,
        usual.threshold,
        area,
        usual.false_accepts,
        calibration_error(probabilities.max(1), right),
        episodes,
        points,
    )


def open_set(
    learner: Learner, images: ClassImages, shape: Shape, fit: Calibration, episodes: int, *, seed: int,
    device: str = "cpu",
) -> OpenSet | None:  # fmt: skip
    """Hold the threshold of `fit` against test episodes of `shape`; None where there is no class to be unknown."""
    if len(images) == shape.ways:
        return None
    answers = _answers(learner, images, shape, episodes, seed, "test", device)
    known, strange = (_evidence(logits, fit.by, fit.temperature) for logits in answers[:2])
    accepted, false_accepts = (float((values >= fit.threshold).mean()) for values in (known, strange))
    return OpenSet(accepted, false_accepts, auroc(known, strange), episodes)


def verification(learner: Learner, images: ClassImages, pairs: int, *, seed: int, device: str = "cpu") -> Verification:
    """Fit `pairs` pairs of validation images, half of one class and half of two, by the similarity that tells best."""
    parts: dict[Similarity, list[np.ndarray]] = {}
    shape = Shape(2, 1, 1)
    with evaluating(learner, images, shape, device=device) as sample:
        for step in range(pairs // 2):
            [episode] = sample(shape, 1, seed=seed, step=step, stream="calibration")
            first, same_then_other = episode.support[:1], episode.query
            for by, alike in similarities(learner, first, same_then_other).items():
                parts.setdefault(by, []).append(alike)
    same = np.tile([True, False], pairs // 2)
    values = {by: np.concatenate(part) for by, part in parts.items()}
    areas = {by: auroc(value[same], value[~same]) for by, value in values.items()}
    best = max(areas, key=lambda by: areas[by])
    slope, offset = _logistic(values[best], same)
    right = (slope * values[best] + offset >= 0) == same
    return Verification(best, slope, offset, areas[best], float(right.mean()), len(same))


@torch.no_grad()
def similarities(learner: Learner, image: torch.Tensor, others: torch.Tensor) -> dict[Similarity, np.ndarray]:
    """How alike an image (1, C, H, W) and each of `others` (N, C, H, W) are, in up to three ways, (N,) each.

    `logit`: what the learner gives to others after adapting to the image as its only class, if that tells anything;
    `cosine` and `distance`: of the features, where an image's are its own (distance is Euclidean, and negative).
    """
    was_training = learner.training
    learner.eval()
    only = torch.zeros(1, dtype=torch.int64, device=image.device)
    found: dict[Similarity, torch.Tensor] = {"logit": learner.classify(learner.adapt(image, only, only), others)[:, 0]}
    if learner.config.norm in BY_ITSELF:
        a, b = learner.embed(image), learner.embed(others)
        found |= {"cosine": F.cosine_similarity(a, b), "distance": -(a - b).norm(dim=1)}
    learner.train(was_training)
    return {by: value.double().cpu().numpy() for by, value in found.items()}


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimises the cross-entropy of logits (N, W) to labels (N,) (Guo et al., 2017)."""
    rows, truth = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_temperature], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(rows / log_temperature.clamp(-7, 7).exp(), truth)
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return float(log_temperature.detach().clamp(-7, 7).exp())


def calibration_error(confidences: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over equal bins of confidence, weighted by their counts."""
    bin_of = np.minimum((confidences * bins).astype(int), bins - 1)
    confidence = np.bincount(bin_of, confidences, minlength=bins)
    accuracy = np.bincount(bin_of, right, minlength=bins)
    return float(np.abs(confidence - accuracy).sum() / len(confidences))


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """The chance that a known query scores higher than an unknown one (ties count half)."""
    scores, ranks_of = np.unique(np.concatenate([known, unknown]), return_inverse=True)
    counts = np.bincount(ranks_of, minlength=len(scores))
    ranks = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each score, from 1
    above = ranks[ranks_of[: len(known)]].sum() - len(known) * (len(known) + 1) / 2
    return float(above / (len(known) * len(unknown)))


def _operating_point(accepted: float, known: np.ndarray, strange: np.ndarray) -> OperatingPoint:
    threshold = float(np.quantile(known, 1 - accepted))
    return OperatingPoint(accepted, threshold, float((strange >= threshold).mean()) if len(strange) else math.nan)


def _logistic(values: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the logistic regression of truth (N,) on values (N,), with a light pull to zero."""
    mean, scale = values.mean(), values.std() + 1e-12
    x, y = torch.from_numpy((values - mean) / scale), torch.from_numpy(truth.astype(np.float64))
    line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([line], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = F.binary_cross_entropy_with_logits(line[0] * x + line[1], y) + 1e-4 * line.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    slope, offset = line.detach().tolist()
    return slope / scale, offset - slope * mean / scale


def _evidence(logits: np.ndarray, by: str, temperature: float) -> np.ndarray:
    if by == "probability" and len(logits):
        logits = (torch.from_numpy(logits) / temperature).softmax(1).numpy()
    return logits.max(1) if len(logits) else np.empty(0)


@torch.no_grad()
def _answers(
    learner: Learner, images: ClassImages, shape: Shape, episodes: int, seed: int, stream: Stream, device: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of known queries (N, ways), of unknown ones (M, ways), and the labels of the known (N,).

    An episode has as many unknown classes as there are, up to its ways: their images are queries only.
    """
    unknown = min(shape.ways, len(images) - shape.ways)
    known_logits, unknown_logits, labels = [], [], []
    wider = Shape(shape.ways + unknown, shape.shots, shape.queries)
    with evaluating(learner, images, wider, device=device) as sample:
        for step in range(episodes):
            [episode] = sample(wider, 1, seed=seed, step=step, stream=stream)
            in_support = episode.support_labels < shape.ways
            state = learner.adapt(
                episode.support[in_support], episode.support_labels[in_support], episode.classes[: shape.ways]
            )
            logits = learner.classify(state, episode.query).cpu().numpy()
            is_known = (episode.query_labels < shape.ways).cpu().numpy()
            known_logits.append(logits[is_known])
            unknown_logits.append(logits[~is_known])
            labels.append(episode.query_labels.cpu().numpy()[is_known])
    return np.concatenate(known_logits), np.concatenate(unknown_logits), np.concatenate(labels)
