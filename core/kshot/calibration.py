"""How far to trust a learner, from validation episodes: a temperature, and a threshold for "none of these"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from kshot.datasets import ClassImages
from kshot.episodes import Shape, sample_episodes
from kshot.learner import Learner

KNOWN_ACCEPTED = 0.95  # share of known queries that the threshold lets pass


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


def calibrate(
    learner: Learner, images: ClassImages, shape: Shape, episodes: int, *, seed: int, device: str = "cpu"
) -> Calibration:
    """Fit temperature and threshold on `episodes` validation episodes, each with unknown classes beside the known.

    An episode has as many unknown classes as the split allows, up to `shape.ways`: their images are queries only.
    The threshold is on the largest logit or the largest probability, whichever separates better.
    """
    unknown = min(shape.ways, len(images) - shape.ways)
    known_logits, unknown_logits, labels = _answers(learner, images, shape, unknown, episodes, seed, device)
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
    threshold = float(np.quantile(known, 1 - KNOWN_ACCEPTED))
    return Calibration(
        shape,
        temperature,
        by,
        threshold,
        area,
        float((strange >= threshold).mean()) if len(strange) else math.nan,
        calibration_error(probabilities.max(1), right),
        episodes,
    )


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


def _evidence(logits: np.ndarray, by: str, temperature: float) -> np.ndarray:
    if by == "probability" and len(logits):
        logits = (torch.from_numpy(logits) / temperature).softmax(1).numpy()
    return logits.max(1) if len(logits) else np.empty(0)


@torch.no_grad()
def _answers(
    learner: Learner, images: ClassImages, shape: Shape, unknown: int, episodes: int, seed: int, device: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of known queries (N, ways), of unknown ones (M, ways), and the labels of the known (N,)."""
    known_logits, unknown_logits, labels = [], [], []
    wider = Shape(shape.ways + unknown, shape.shots, shape.queries)
    was_training = learner.training
    learner.eval()
    for step in range(episodes):
        [episode] = sample_episodes(images, wider, 1, seed=seed, step=step, stream="calibration").to(device)
        in_support = episode.support_labels < shape.ways
        state = learner.adapt(
            episode.support[in_support], episode.support_labels[in_support], episode.classes[: shape.ways]
        )
        logits = learner.classify(state, episode.query).cpu().numpy()
        is_known = (episode.query_labels < shape.ways).cpu().numpy()
        known_logits.append(logits[is_known])
        unknown_logits.append(logits[~is_known])
        labels.append(episode.query_labels.cpu().numpy()[is_known])
    learner.train(was_training)
    return np.concatenate(known_logits), np.concatenate(unknown_logits), np.concatenate(labels)
