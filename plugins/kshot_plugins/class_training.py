"""Class training: telling all base classes apart, which transfer learners do where others play episodes.

No learner by itself, but what several of them share: the head that they train with, which no bundle holds, and the
simplest way to answer with features made so.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor, nn

from kshot import FeatureLearner, LearnerConfig, State, class_means, unit


class BaseHead(nn.Module):
    """Logits over all base classes (N, classes) from features (N, features), standardised over their batch first.

    Features that leave a ReLU have a large mean in common, and rows that start at random first have to unlearn it: with
    the 4,112 classes of Omniglot that took most of a training. Without the mean, and from rows of almost nothing, as
    many images teach far more.
    """

    def __init__(self, features: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.standardise = nn.BatchNorm1d(features, affine=False, track_running_stats=False)
        self.logits = nn.Linear(features, sum(classes))
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.zeros_(self.logits.bias)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.standardise(features))
        return logits


class ByAngle(FeatureLearner):
    """A new class is where the mean of its unit features points; logits are cosines to it, times a scale."""

    class Config(LearnerConfig):
        scale: float = Field(10.0, gt=0, description="what cosines are multiplied by to become logits")

    config: Config

    def prepare(self, classes: Sequence[int]) -> None:
        self.base = BaseHead(self.backbone.features, classes)

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"directions": unit(class_means(unit(features), labels, classes))}  # (W, D)

    def logits(self, state: State, features: Tensor) -> Tensor:
        return self.config.scale * unit(features) @ state["directions"].t()
