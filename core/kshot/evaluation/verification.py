"""Verification: whether two images show one class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kshot.data.embeddings import embedded
from kshot.data.episodes import Shape
from kshot.evaluation.calibration import Trial
from kshot.evaluation.scores import answer, batches, evaluating
from kshot.evaluation.statistics import auroc, logistic
from kshot.learner import Learner
from kshot.norms import BY_ITSELF

Similarity = Literal["logit", "cosine", "distance"]


@dataclass(frozen=True)
class Verification:
    """The probability that two images show the same class is sigmoid(slope * similarity + offset)."""

    by: Similarity  # see `similarities`
    slope: float
    offset: float
    auroc: float  # of the similarity, for pairs of one class against pairs of two
    accuracy: float  # at probability 0.5, with as many pairs of one class as of two
    pairs: int


def verification(trials: Sequence[Trial], pairs: int, *, seed: int, device: str = "cpu") -> Verification:
    """Fit on `pairs` pairs of validation images, half of one class and half of two, the similarity of best AUROC.

    Several trials, such as the folds of a cross-validation, share the pairs.
    """
    parts: dict[Similarity, list[np.ndarray]] = {}
    for number, (learner, images) in enumerate(trials):
        images, share = embedded(learner, images, device=device), (pairs // 2 + number) // len(trials)
        for batch in batches(images, Shape(2, 1, 1), share, seed=seed, stream="calibration", device=device):
            for by, values in similarities(learner, batch.support[:, :1], batch.query).items():
                parts.setdefault(by, []).append(values.flatten())
    same = np.tile([True, False], pairs // 2)
    similarity = {by: np.concatenate(part) for by, part in parts.items()}
    areas = {by: auroc(each[same], each[~same]) for by, each in similarity.items()}
    best = max(areas, key=lambda by: areas[by])
    slope, offset = logistic(similarity[best], same)
    right = (slope * similarity[best] + offset >= 0) == same
    return Verification(best, slope, offset, areas[best], float(right.mean()), len(same))


@torch.no_grad()
def similarities(learner: Learner, images: Tensor, others: Tensor) -> dict[Similarity, np.ndarray]:
    """Similarities (E, N) of images (E, 1, C, H, W) and the `others` of each (E, N, C, H, W), in up to three measures.

    `logit` is the logit of each other image after adapting to the image as the only class. If features do not depend on
    other images, also the `cosine` of the features and their negative Euclidean `distance`. Takes features too.
    """
    only = torch.zeros(1, dtype=torch.int64, device=images.device)
    with evaluating(learner):
        found: dict[Similarity, Tensor] = {"logit": answer(learner, images, only, others, only)["logits"][..., 0]}
        if learner.backbone.norm in BY_ITSELF:
            a, b = (learner.embed(part.flatten(0, 1)).unflatten(0, part.shape[:2]) for part in (images, others))
            found |= {"cosine": F.cosine_similarity(a, b, dim=2), "distance": -(a - b).norm(dim=2)}
    return {by: value.double().cpu().numpy() for by, value in found.items()}
