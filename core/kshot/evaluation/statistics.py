"""The statistics of an evaluation: intervals, calibration error, AUROC, fits of a temperature and a logistic curve."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean of values (episodes,), and half its 95 % interval: 1.96 * sd / sqrt(n), with the sample's sd."""
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


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


def logistic(values: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
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
