"""Whitening by within-class covariance of the base classes: the common base of `whitened`, `plda` and `ridge`.

The photos of one user share nuisance variation (camera, shelf, light), which the within-class covariance captures.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from kshot import Backbone, FeatureLearner, LearnerConfig, class_means, one_hot, solve, unit

_MOST = 3000  # base photos that the scatter is taken from, evenly over the classes: it bounds the time
_DIRECTIONS = 256  # in which photos of a class differ most; in all others they are taken to differ alike
_EXACT = 2048  # photos or dimensions up to which eigenvectors are exact; above, by subspace iteration
_STEPS = 16  # of conjugate gradients


class Scatter(NamedTuple):
    """The pooled within-class covariance of x = unit(z - mean): S = V diag(values) V' + rest (I - VV')."""

    mean: Tensor  # (D,)
    vectors: Tensor  # V (D, r), orthonormal
    values: Tensor  # (r,) the leading eigenvalues
    rest: Tensor  # () the mean of the others
    level: Tensor  # () the mean of all


class WhitenedSpace(FeatureLearner):
    """Centres features, whitens them by the within-class covariance of the base classes, and normalises their length.

    The covariance is shrunk towards a multiple of the identity by `shrinkage`, so few base photos are enough; without
    any, features are only normalised. `adapt` adds the within-class scatter of the support set, which is zero
    for one photo per class.
    """

    norms = ("running", "group")
    prefers: ClassVar[Sequence[str]] = ("inner", "stages", "last")

    class Config(LearnerConfig):
        shrinkage: float | None = Field(
            None, gt=0, le=1, description="shrinkage of the within-class covariance; chosen on validation if unset"
        )
        prior: float = Field(
            20.0,
            gt=0,
            description="weight of the base classes' scatter, as a number of support photos",
        )

    config: Config
    mean: Tensor  # (D,)
    vectors: Tensor  # (D, r)
    damping: Tensor  # (r,) change of the weight of each of these directions: -1 removes it, 0 keeps it

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        for name, size in (("mean", (0,)), ("vectors", (0, 0)), ("damping", (0,))):
            self.register_buffer(name, torch.empty(size))

    def choices(self) -> Sequence[dict[str, Any]]:
        return [{"shrinkage": value} for value in (0.6, 0.9)] if self.config.shrinkage is None else [{}]

    def learn_statistics(self, base: Iterable[Tensor]) -> None:
        found = scatter(base if isinstance(base, Hashable) else tuple(base))
        shrinkage = 0.6 if self.config.shrinkage is None else self.config.shrinkage
        floor = shrinkage * found.level
        ratio = ((1 - shrinkage) * found.rest + floor) / ((1 - shrinkage) * found.values + floor)
        self.mean, self.vectors, self.damping = found.mean, found.vectors, ratio.sqrt() - 1

    def space(self, features: Tensor) -> Tensor:
        """Whitened rows (N, D) of unit length, so that the overall scale of the covariance cancels."""
        if not self.damping.numel():
            return unit(features)
        x = unit(features - self.mean)
        return unit(x + ((x @ self.vectors) * self.damping) @ self.vectors.t())

    def corrected_means(self, rows: Tensor, labels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The class means P (W, D) of support rows (S, D), and M P, corrected for the support set's own scatter.

        M = (I + R'R / (prior t))^-1 for residuals R (S, D) about the class means and their variance t in a dimension:
        by Woodbury's identity an (S, S) system. One photo of each class has no residual, and then M = I.
        """
        means = class_means(rows, labels, classes)
        residuals = rows - one_hot(labels, classes).to(rows.dtype) @ means
        freedom = (torch.ones_like(labels).sum() - torch.ones_like(classes).sum()).clamp_min(1).to(rows.dtype)
        gram = residuals @ residuals.t()  # (S, S)
        variance = residuals.square().sum() / (freedom * rows.shape[1])
        ridge = self.config.prior * torch.maximum(variance, 1e-4 * rows.square().mean())  # no residual is rounding only
        weights = solve(lambda v: gram @ v + ridge * v, residuals @ means.t(), _STEPS)  # (S, W)
        return means, means - weights.t() @ residuals

    def prototypes(self, rows: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        """The corrected class means (W, D), of length 1 in the metric of M: cosines to them are inner products."""
        means, corrected = self.corrected_means(rows, labels, classes)
        return corrected / (means * corrected).sum(1, keepdim=True).clamp_min(1e-12).sqrt()


@lru_cache(maxsize=16)  # the shrinkages that are tried share it
def scatter(base: Sequence[Tensor]) -> Scatter:
    """The within-class covariance, from the features (N, D) of each class; takes seconds for a thousand photos."""
    most = max(2, _MOST // max(len(base), 1))
    classes = [features[:most].float() for features in base]
    mean = torch.cat(classes).mean(0)
    centred = [unit(features - mean) for features in classes]
    residuals = torch.cat([x - x.mean(0) for x in centred])  # (N, D)
    residuals = residuals / max(len(residuals) - len(centred), 1) ** 0.5
    vectors, values = _leading(residuals)
    level = residuals.square().sum() / len(mean)
    rest = (level * len(mean) - values.sum()) / max(len(mean) - len(values), 1)
    return Scatter(mean, vectors, values, rest.clamp_min(0), level)


def _leading(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors (D, r) and eigenvalues (r,) of R'R for rows R (N, D)."""
    if min(rows.shape) > _EXACT:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, singular, vectors = torch.svd_lowrank(rows, _DIRECTIONS + 32, niter=4)
        return vectors[:, :_DIRECTIONS].contiguous(), singular[:_DIRECTIONS].square()
    few = rows.shape[0] <= rows.shape[1]  # then the (N, N) Gram matrix has the same eigenvalues
    values, vectors = torch.linalg.eigh(rows @ rows.t() if few else rows.t() @ rows)
    values, vectors = values[-_DIRECTIONS:], vectors[:, -_DIRECTIONS:]
    kept = values > values[-1].clamp_min(1e-12) * 1e-5
    values, vectors = values[kept], vectors[:, kept]
    return rows.t() @ (vectors / values.sqrt()) if few else vectors.contiguous(), values
