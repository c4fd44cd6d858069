"""Statistics of evaluations: intervals, calibration error, AUROC, temperature and logistic fits."""

from __future__ import annotations

import math

import numpy as np


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean of values (episodes,), and half its 95 % interval: 1.96 * sd / sqrt(n), with the sample's sd."""
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimises the cross-entropy of logits (N, W) to labels (N,) (Guo et al., 2017).

    Between exp(-7) and exp(7), by Newton's method on its inverse, in which the cross-entropy is convex. A step that
    would leave the interval that brackets the minimum is replaced by a bisection.
    """
    rows = logits.astype(np.float64)
    rows -= rows[np.arange(len(rows)), labels, None]
    highest, low, high, inverse = rows.max(1, keepdims=True), math.exp(-7), math.exp(7), 1.0
    for _ in range(100):
        shares = np.exp(inverse * (rows - highest))
        shares /= shares.sum(1, keepdims=True)
        mean = (shares * rows).sum(1)
        slope, curvature = mean.mean(), ((shares * rows**2).sum(1) - mean**2).mean()
        if slope == 0:
            break
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else math.inf
        before, inverse = inverse, step if low < step < high else math.sqrt(low * high)
        if abs(inverse - before) < 1e-9 * before:
            break
    return 1 / inverse


def calibration_error(confidences: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: mean |confidence - accuracy| over equal bins of confidence, weighted by count."""
    bin_of = np.minimum((confidences * bins).astype(int), bins - 1)
    confidence = np.bincount(bin_of, confidences, minlength=bins)
    accuracy = np.bincount(bin_of, right, minlength=bins)
    return float(np.abs(confidence - accuracy).sum() / len(confidences))


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a known query scores above an unknown one (ties count half)."""
    scores, ranks_of = np.unique(np.concatenate([known, unknown]), return_inverse=True)
    counts = np.bincount(ranks_of, minlength=len(scores))
    ranks = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each score, from 1
    above = ranks[ranks_of[: len(known)]].sum() - len(known) * (len(known) + 1) / 2
    return float(above / (len(known) * len(unknown)))


def logistic(values: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the logistic regression of truth (N,) on values (N,), lightly regularised (L2)."""
    mean, scale = values.mean(), values.std() + 1e-12
    design, line = np.stack([(values - mean) / scale, np.ones(len(values))], 1), np.zeros(2)  # (N, 2), (2,)

    def loss(line: np.ndarray) -> float:
        logits = design @ line
        return float((np.logaddexp(0, logits) - truth * logits).mean() + 1e-4 * line @ line)

    for _ in range(50):  # Newton's method, each step halved until the loss falls
        share = (1 + np.tanh(design @ line / 2)) / 2
        slope = design.T @ (share - truth) / len(values) + 2e-4 * line
        curvature = (design.T * (share * (1 - share))) @ design / len(values) + 2e-4 * np.eye(2)
        step = np.linalg.solve(curvature, slope)
        sizes = (size for size in 0.5 ** np.arange(20) if loss(line - size * step) < loss(line))
        if (size := next(sizes, None)) is None:
            break
        line = line - size * step
    slope, offset = line.tolist()
    return slope / scale, offset - slope * mean / scale
