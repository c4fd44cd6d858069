"""What logits mean: a class with a calibrated probability, or that the photo is none of them, or that it may be two.

Arrays in, verdicts out; every query is judged by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Literal

import numpy as np

from kshot_runtime.bundle import softmax
from kshot_runtime.manifest import Calibration, OperatingPoint, Verification

Decision = Literal["match", "ambiguous", "unknown"]

LIKELY = 0.5  # a class that is less likely than this is more likely wrong than right
RIVAL = 0.5  # and beside a runner-up that is more than half as likely, naming the first errs once in three times


@dataclass(frozen=True)
class Verdicts:
    """A row for each query."""

    probabilities: np.ndarray  # (Q, W), calibrated if the bundle is
    decisions: tuple[Decision, ...]


def judge(
    logits: np.ndarray, calibration: Calibration | None, verification: Verification | None, accept: float,
    alike: np.ndarray | None = None,
) -> Verdicts:  # fmt: skip
    """Read logits (Q, W) by the calibration that fits, so that a share `accept` of known photos is not unknown.

    Among classes, the softmax of the calibrated logits tells which. For one class it says 1 whatever comes, so there
    the bundle's verification tells whether a photo shows what the class's photos show: `alike` (Q,) is the similarity
    that it is about, where that is one of features (see `by_features`).
    """
    ways = logits.shape[1]
    if ways == 1 and verification is not None:
        if verification.by == "logit":
            alike = logits[:, 0]
        if alike is not None:
            return _verdicts_on_one(logits, alike, calibration, verification, accept)
    probabilities = softmax(logits / (calibration.temperature if calibration else 1.0))
    known = np.ones(len(logits), bool)
    limit = threshold(calibration, accept)
    if calibration is not None and limit is not None and (ways > 1 or calibration.by == "logit"):
        known = (logits if calibration.by == "logit" else probabilities).max(1, initial=-math.inf) >= limit
    return Verdicts(probabilities, tuple(map(_decision, probabilities.tolist(), known)))


def threshold(calibration: Calibration | None, accept: float) -> float | None:
    """What a share of known photos reaches: between the measured points on a line, beyond them the outermost."""
    if calibration is None or not calibration.points:
        return None if calibration is None else calibration.threshold
    below = max((point for point in calibration.points if point.accepted <= accept), key=_share, default=None)
    above = min((point for point in calibration.points if point.accepted >= accept), key=_share, default=None)
    if below is None or above is None or below.accepted == above.accepted:
        return (below or above or calibration).threshold
    way = (accept - below.accepted) / (above.accepted - below.accepted)
    return below.threshold + way * (above.threshold - below.threshold)


def by_features(verification: Verification | None, ways: int) -> bool:
    """Whether it takes features of images by themselves to tell these classes from all else."""
    return ways == 1 and verification is not None and verification.by != "logit"


def similarity(verification: Verification, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How alike features (A, D) and (B, D) are, (A, B), in the way that the verification is about."""
    if verification.by == "cosine":
        return unit(a) @ unit(b).T
    return -np.linalg.norm(a[:, None] - b[None], axis=2)


def same(verification: Verification, alike: np.ndarray) -> np.ndarray:
    """The probability that two images of this similarity show one class."""
    evidence = verification.slope * np.asarray(alike, np.float64) + verification.offset
    return 1 / (1 + np.exp(-np.clip(evidence, -700, 700)))


def nearest(queries: np.ndarray, support: np.ndarray, count: int = 3) -> list[list[tuple[int, float]]]:
    """For each query, the support rows that its features are nearest to by cosine, and the cosines.

    `support` has unit rows.
    """
    return [[(i, row[i]) for i in largest(row, count)] for row in (unit(queries) @ support.T).tolist()]


def largest(values: Sequence[float], count: int) -> list[int]:
    """Where the largest values are, the largest first. (Faster than numpy's sort, which lets go of the GIL.)"""
    return nlargest(count, range(len(values)), key=values.__getitem__)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays."""
    lengths: np.ndarray = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows / lengths


def _verdicts_on_one(
    logits: np.ndarray, alike: np.ndarray, calibration: Calibration | None, verification: Verification, accept: float
) -> Verdicts:
    probabilities = same(verification, alike)
    limit = threshold(calibration, accept)
    if verification.by == "logit" and calibration is not None and calibration.by == "logit" and limit is not None:
        known = logits[:, 0] >= limit  # here the share is known
    else:
        known = probabilities >= LIKELY
    decisions: tuple[Decision, ...] = tuple("match" if each else "unknown" for each in known)
    return Verdicts(probabilities[:, None], decisions)


def _decision(probabilities: Sequence[float], known: bool) -> Decision:
    if not known:
        return "unknown"
    first, second = nlargest(2, (*probabilities, 0.0))
    return "ambiguous" if first < LIKELY or second > RIVAL * first else "match"


def _share(point: OperatingPoint) -> float:
    return point.accepted
