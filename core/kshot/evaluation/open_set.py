"""Open-set recognition: how well queries of unknown classes are told from those of known ones."""

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
    """What a threshold from validation classes does on test episodes that hold as many unknown classes as known."""

    accepted: float  # share of known queries that pass
    false_accepts: float  # share of unknown queries that pass
    auroc: float  # of telling known from unknown classes, at any threshold
    let_in: float  # share of unknown queries that pass where 95 % of the known do, the threshold set on these episodes
    episodes: int


def open_set(
    parts: Sequence[Trial], shape: Shape, fit: Calibration, episodes: int, *, seed: int, device: str = "cpu"
) -> OpenSet | None:
    """Hold the threshold of `fit` against test episodes of `shape`; None where there is no class to be unknown.

    With several parts, say the folds of a cross-validation, each takes its share of the episodes.
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
