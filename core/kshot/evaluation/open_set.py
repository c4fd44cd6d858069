"""Open-set recognition: how well queries of unknown classes are detected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kshot.data.episodes import Shape
from kshot.evaluation.calibration import Calibration, Trial, concatenated, known_and_unknown, operating_point
from kshot.evaluation.statistics import auroc
from kshot_runtime.bundle import evidence


@dataclass(frozen=True)
class OpenSet:
    """The effect of a threshold from validation classes on test episodes with as many unknown classes as known ones."""

    accepted: float  # share of known queries that pass
    false_accepts: float  # share of unknown queries that pass
    auroc: float  # of the score, for known against unknown queries
    let_in: float  # share of unknown queries that pass at the threshold, of these episodes, that 95 % of the known pass
    episodes: int


def open_set(
    parts: Sequence[Trial], shape: Shape, fit: Calibration, episodes: int, *, seed: int, device: str = "cpu"
) -> OpenSet | None:
    """Evaluate the threshold of `fit` on test episodes of `shape`; None if no class is left to be unknown.

    Several parts, such as the folds of a cross-validation, share the episodes.
    """
    parts = [(learner, images) for learner, images in parts if len(images) > shape.ways]
    if not parts:
        return None
    answers = [
        known_and_unknown(learner, images, shape, math.ceil(episodes / len(parts)), seed, "test", device)
        for learner, images in parts
    ]
    inside, outside = concatenated(answer[0] for answer in answers), concatenated(answer[1] for answer in answers)
    known, unknown = (evidence(side, fit.by, fit.temperature) for side in (inside, outside))
    accepted, false_accepts = (float((values >= fit.threshold).mean()) for values in (known, unknown))
    let_in = operating_point(0.95, known, unknown).false_accepts
    return OpenSet(accepted, false_accepts, auroc(known, unknown), let_in, episodes)
