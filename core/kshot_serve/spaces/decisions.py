"""What logits mean: a class with a calibrated probability, or that the photo is none of them, or that it may be two.

Arrays in, verdicts out; every query is judged by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Literal

import numpy as np

from kshot_runtime.bundle import Tensors, evidence, softmax
from kshot_runtime.manifest import Calibration, Verification

Decision = Literal["match", "ambiguous", "unknown"]

LIKELY = 0.5  # a class that is less likely than this is more likely wrong than right
RIVAL = 0.5  # and beside a runner-up that is more than half as likely, naming the first errs once in three times
CLEAR = 0.5  # of the distance to the own class: of 45 new classes of fruit 1 to 3 have a photo nearer to another one


@dataclass(frozen=True)
class Verdicts:
    """A row for each query."""

    probabilities: np.ndarray  # (Q, W), calibrated if the bundle is
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class Operating:
    """A threshold, and what it did on validation: the share of known photos that passed, and of unknown ones."""

    threshold: float
    accepted: float | None
    false_accepts: float | None


def judge(
    outputs: Tensors, calibration: Calibration | None, verification: Verification | None, accept: float | None,
    alike: np.ndarray | None = None,
) -> Verdicts:  # fmt: skip
    """Read what classify.onnx gave, logits (Q, W) among it, by the calibration that fits (see `operating`).

    Among classes, the softmax of the calibrated logits tells which. For one class it says 1 whatever comes, so there
    the bundle's verification tells whether a photo shows what the class's photos show: `alike` (Q,) is the similarity
    that it is about, where that is one of features (see `by_features`).
    """
    logits, temperature = outputs["logits"], calibration.temperature if calibration else 1.0
    probabilities, known = softmax(logits / temperature), np.ones(len(logits), bool)
    ways = logits.shape[1]
    if ways == 1 and verification is not None and (alike is not None or verification.by == "logit"):
        probabilities = same(verification, logits[:, 0] if alike is None else alike)[:, None]
        known = probabilities[:, 0] >= LIKELY
    point = operating(calibration, verification, ways, accept)
    if calibration is not None and point is not None:
        known = evidence(outputs, calibration.by, temperature) >= point.threshold
    if ways == 1:
        return Verdicts(probabilities, tuple("match" if each else "unknown" for each in known))
    return Verdicts(probabilities, tuple(map(_decision, probabilities.tolist(), known)))


def operating(
    calibration: Calibration | None, verification: Verification | None, ways: int, accept: float | None
) -> Operating | None:
    """The threshold in force: the one that lets a share `accept` of known photos pass; by default the bundle's own.

    Between the measured points it lies on a line, beyond them it is the outermost. None where nothing was measured, or
    the evidence says nothing of one class.
    """
    if (
        calibration is None
        or calibration.threshold is None
        or (ways == 1 and not _tells_one(calibration, verification))
    ):
        return None
    points = sorted(calibration.points, key=lambda point: point.accepted)
    shares = [point.accepted for point in points]
    if accept is None or not points:
        accepted = calibration.accepted
        if accepted is None and points:  # kshot's own exports did not say it
            limits = [-point.threshold for point in points]
            accepted = float(np.interp(-calibration.threshold, limits, shares))
        return Operating(calibration.threshold, accepted, calibration.false_accepts)

    def at(values: list[float]) -> float:
        return float(np.interp(accept, shares, values))

    passed = [point.false_accepts for point in points if point.false_accepts is not None]
    return Operating(
        at([point.threshold for point in points]), at(shares), at(passed) if len(passed) == len(points) else None
    )


def _tells_one(calibration: Calibration, verification: Verification | None) -> bool:
    """Whether the evidence tells one class from all else: a softmax over it says 1, logits may say nothing either."""
    if calibration.by in ("logit", "energy"):
        return verification is None or verification.by == "logit"
    return calibration.by != "probability"


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


def closer(photos: np.ndarray, own: np.ndarray, others: Sequence[np.ndarray]) -> list[int | None]:
    """For each of a class's new photos (N, D), which other class it is clearly closer to, if any.

    It is compared, by cosine, with the mean of the other photos of its class, new ones and those there already, `own`
    (M, D), and with the means of `others`, (K, D) each. All rows are unit. Those other photos must be closer to each
    other than to it: of two photos that differ either may be the wrong one, and where all differ the class looks so.
    """
    count = len(photos) + len(own)
    if not others or count < 3:
        return [None] * len(photos)
    total = photos.sum(0) + own.sum(0)
    to_others = photos @ total - 1  # sums of cosines, (N,)
    among_others = (total @ total - count - 2 * to_others) / (count - 2)
    alike = photos @ unit(np.stack([rows.mean(0) for rows in others])).T  # (N, classes)
    clearly = 1 - alike.max(1) < CLEAR * (1 - (photos * unit(total - photos)).sum(1))
    clearly &= among_others > to_others
    return [i if yes else None for i, yes in zip(alike.argmax(1).tolist(), clearly.tolist(), strict=True)]


def largest(values: Sequence[float], count: int) -> list[int]:
    """Where the largest values are, the largest first. (Faster than numpy's sort, which lets go of the GIL.)"""
    return nlargest(count, range(len(values)), key=values.__getitem__)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays."""
    lengths: np.ndarray = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows / lengths


def _decision(probabilities: Sequence[float], known: bool) -> Decision:
    if not known:
        return "unknown"
    first, second = nlargest(2, (*probabilities, 0.0))
    return "ambiguous" if first < LIKELY or second > RIVAL * first else "match"
