"""Probabilistic LDA: logits are log-likelihood ratios of a known class against an unseen class, under Gaussian models.

Ioffe, 2006 (https://doi.org/10.1007/11744085_41); Prince and Elder, 2007 (https://doi.org/10.1109/ICCV.2007.4409052).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kshot import Backbone, Learner, State, hookimpl, one_hot
from kshot_plugins.whitening import WhitenedSpace


class PLDA(WhitenedSpace):
    """Models class centres as N(0, B) and photos of a class as N(centre, I), in a whitened and scaled feature space.

    The within-class covariance (whitening) and the between-class covariance B are estimated from the base classes. The
    logit is the log-likelihood ratio of the class against an unseen class, and accounts for the number of photos. B is
    the covariance of the base classes' means in the directions in which they differ, shrunk towards a multiple of the
    identity, and that multiple in all other directions; so a few base classes are enough.

    Good for photographs with few photos per class, and for rejecting unknown classes. With five or more photos of few
    classes `names = "cosine"` may classify better; the ratio is still used to reject unknown photos.
    """

    name = "plda"
    prefers: ClassVar[Sequence[str]] = ("inner", "stages")

    class Config(WhitenedSpace.Config):
        between: float = Field(
            0.5, gt=0, le=1, description="shrinkage of the covariance of class means towards the identity"
        )
        names: Literal["ratio", "cosine"] | None = Field(
            None, description="classify by the ratio, or by cosines in the same space; chosen on validation if unset"
        )
        scale: float = Field(0.04, gt=0, description="logits per unit of the ratio")
        cosine_scale: float = Field(25.0, gt=0, description="logits per unit of cosine")

    config: Config
    centre: Tensor  # (D,) mean of the whitened base features
    deviation: Tensor  # () standard deviation within a class in one dimension
    directions: Tensor  # (D, C - 1) in which the base classes' means differ
    spread: Tensor  # (C - 1,) variances of class centres in these directions
    other_spread: Tensor  # () and in all others

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        width = backbone.features
        self.register_buffer("centre", torch.zeros(width))
        # Without base classes: rows of unit length, whose variance is 0.7 within classes and 0.3 between them.
        self.register_buffer("deviation", torch.tensor(0.7 / width).sqrt())
        self.register_buffer("directions", torch.empty(width, 0))
        self.register_buffer("spread", torch.empty(0))
        self.register_buffer("other_spread", torch.tensor(0.3 / 0.7))

    def choices(self) -> Sequence[dict[str, Any]]:
        shrinkages = (0.6, 0.3) if self.config.shrinkage is None else (self.config.shrinkage,)
        names = ("ratio", "cosine") if self.config.names is None else (self.config.names,)
        return [{"shrinkage": shrinkage, "names": name} for name in names for shrinkage in shrinkages]

    def learn_statistics(self, base: Iterable[Tensor]) -> None:
        super().learn_statistics(base)
        classes = [self.space(features.float()) for features in base]
        if len(classes) < 2:  # nothing shows how classes differ
            return
        counts = torch.tensor([len(rows) for rows in classes])
        means = torch.stack([rows.mean(0) for rows in classes])  # (C, D)
        within = sum((rows - mean).square().sum() for rows, mean in zip(classes, means, strict=True))
        variance = within / (counts.sum() - len(classes)).clamp_min(1) / means.shape[1]
        self.centre, self.deviation = torch.cat(classes).mean(0), variance.clamp_min(1e-12).sqrt()
        offsets = ((means - means.mean(0)) / self.deviation / (len(classes) - 1) ** 0.5).double()
        values, vectors = torch.linalg.eigh(offsets @ offsets.t())  # of C - 1 directions; the first is of the mean
        kept = values > values[-1] * 1e-6
        values, vectors = values[kept], vectors[:, kept]
        noise = (1 / counts).mean().double()  # what the scatter within classes adds to the covariance of their means
        level = values.sum() / means.shape[1]
        rest = self.config.between * torch.maximum(level - noise, 0.01 * level)
        self.directions = (offsets.t() @ (vectors / values.sqrt())).float()
        self.spread = ((1 - self.config.between) * (values - noise) + rest).clamp_min(rest).float()
        self.other_spread = rest.float()

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        rows = self.space(features)
        photos = one_hot(labels, classes).to(rows.dtype).sum(0)[:, None]  # (W, 1) of each class
        _, means = self.corrected_means(self._scaled(rows), labels, classes)
        inside, outside = self._split(means)
        b, b0, dimensions = self.spread, self.other_spread, means.shape[1] - self.spread.shape[0]
        c, c0 = 1 / (1 / b + photos), 1 / (1 / b0 + photos)  # (W, C - 1), (W, 1): variance of the centre, given photos
        f, f0 = c * photos / (1 + c), c0 * photos / (1 + c0)
        constants = outside * c0 * photos * f0 + dimensions * ((1 + c0) / (1 + b0)).log()
        state = {"rows": f0 * means, "rest": (1 / (1 + b0) - 1 / (1 + c0)) / 2}  # (W, D), (W, 1)
        if b.shape[0]:
            constants = constants + (inside.square() * c * photos * f + ((1 + c) / (1 + b)).log()).sum(1, keepdim=True)
            state["rows"] = state["rows"] + (inside * (f - f0)) @ self.directions.t()
            state["squares"] = (1 / (1 + b) - 1 / (1 + c)) / 2  # (W, C - 1)
        state["constants"] = -constants / 2  # (W, 1)
        if self.config.names == "cosine":
            state["prototypes"] = self.prototypes(rows, labels, classes)
        return state

    def logits(self, state: State, features: Tensor) -> Tensor:
        if self.config.names == "cosine":
            return self.config.cosine_scale * self.space(features) @ state["prototypes"].t()
        return self.config.scale * self.ratios(state, features)

    def evidence(self, state: State, features: Tensor) -> State:
        return {"ratio": self.ratios(state, features).amax(1)}

    def ratios(self, state: State, features: Tensor) -> Tensor:
        """Log-likelihood ratios (Q, W) of each class against an unseen class."""
        rows = self._scaled(self.space(features))
        inside, outside = self._split(rows)
        found = rows @ state["rows"].t() + outside * state["rest"].t() + state["constants"].t()
        return found + inside.square() @ state["squares"].t() if self.spread.shape[0] else found

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates (N, C - 1) in which base classes differ, and squared lengths (N, 1) in the other directions."""
        length = rows.square().sum(1, keepdim=True)
        if not self.spread.shape[0]:
            return rows[:, :0], length
        inside = rows @ self.directions
        return inside, (length - inside.square().sum(1, keepdim=True)).clamp_min(0)

    def _scaled(self, rows: Tensor) -> Tensor:
        """Whitened rows (N, D), scaled to unit within-class variance per dimension."""
        return (rows - self.centre) / self.deviation


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [PLDA]
