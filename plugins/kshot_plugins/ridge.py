"""Ridge regression: a linear head for each episode in closed form, as in R2-D2.

Bertinetto, Henriques, Torr and Vedaldi, 2019. https://arxiv.org/abs/1805.08136
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import Backbone, Learner, State, hookimpl, one_hot, solve, unit
from kshot_plugins.whitening import WhitenedSpace


class Ridge(WhitenedSpace):
    """Regresses one-hot labels on features, in the dual: an (S, S) system solved by conjugate gradients. Samples are
    weighted so that all classes count the same.

    Regularisation and scale of the logits can be meta-learned, as in the paper. With `whiten`, features are whitened
    with statistics of the base classes.

    Good for many classes with several photos each, where a linear head can improve on class means.
    """

    name = "ridge"
    prefers: ClassVar[Sequence[str]] = ("stages", "last")

    class Config(WhitenedSpace.Config):
        whiten: bool | None = Field(None, description="regress on whitened features; chosen on validation if unset")
        regularisation: float = Field(1.0, gt=0, description="ridge penalty, for features of unit length")
        scale: float = Field(10.0, gt=0, description="factor from regression outputs to logits")
        learn: bool = Field(False, description="meta-learn regularisation and scale, starting at their values")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        start = torch.tensor([config.regularisation, config.scale]).log()
        self.logarithms = nn.Parameter(start) if config.learn else nn.Buffer(start)

    def choices(self) -> Sequence[dict[str, Any]]:
        kinds = (True, False) if self.config.whiten is None else (self.config.whiten,)
        return [{"whiten": kind} for kind in kinds]

    def learn_statistics(self, base: Iterable[Tensor]) -> None:
        if self.config.whiten:
            super().learn_statistics(base)

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        targets = one_hot(labels, classes).to(features.dtype)  # (S, W)
        shots = (targets @ targets.sum(0)[:, None]).reciprocal()  # (S, 1) one over the photos of its class
        weights = (shots / shots.mean()).sqrt()
        rows = weights * self._rows(features)
        gram, ridge = rows @ rows.t(), self.logarithms[0].exp()
        duals = solve(lambda v: gram @ v + ridge * v, weights * targets, 16)  # (S, W)
        return {"weights": duals.t() @ rows}  # (W, D)

    def logits(self, state: State, features: Tensor) -> Tensor:
        return self.logarithms[1].exp() * self._rows(features) @ state["weights"].t()

    def _rows(self, features: Tensor) -> Tensor:
        return self.space(features) if self.config.whiten else unit(features)


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [Ridge]
