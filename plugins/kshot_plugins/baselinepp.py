"""Baseline++: fine-tuning by angle. The heads of base classes and of episodes use the directions of features only.

Chen, Liu, Kira, Wang and Huang, 2019. https://arxiv.org/abs/1904.04232
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kshot import (
    Backbone,
    Episodes,
    FeatureLoop,
    Learner,
    LearnerConfig,
    State,
    class_means,
    cross_entropy,
    gradient,
    hookimpl,
    one_hot,
    unit,
)


class BaselinePlusPlus(FeatureLoop):
    """Logits are cosines between a feature and a row for each class, times a scale.

    Where the paper draws an episode's rows at random, they start at the class means of the support set's directions:
    the answer then depends on the support set only, and no step at all is nearest mean by angle.

    Good for features from a class-trained or pretrained backbone whose length means little. It starts where nearest
    mean by angle stands, and gradient steps improve on that where there are several shots.
    """

    name = "baselinepp"
    coupled = ("running", "support", "batch")  # class training embeds all images of a batch together

    class Config(LearnerConfig):
        steps: int = Field(100, ge=0, description="gradient steps for an episode's head")
        rate: float = Field(1.0, gt=0, le=4, description="of the head, divided by scale²; over 4, descent may diverge")
        scale: float = Field(10.0, gt=0, description="what cosines are multiplied by to become logits")
        learn_scale: bool = Field(False, description="let class training change the scale, starting from this one")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        log_scale = torch.tensor(config.scale).log()
        self.log_scale = nn.Parameter(log_scale) if config.learn_scale else nn.Buffer(log_scale)

    @property
    def steps(self) -> int:
        return self.config.steps

    def prepare(self, classes: Sequence[int]) -> None:
        """Nearly equal rows of unit length for all base classes: the common mean of the features then cancels.

        Features after a ReLU lie in a narrow cone, and rows in random directions first have to be trained into it.
        """
        common = torch.ones(self.backbone.features) / self.backbone.features**0.5
        self.base = nn.Parameter(common + 0.001 * torch.randn(sum(classes), self.backbone.features))

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """Cross-entropy over all base classes, of every image of the episodes, support and query alike."""
        images, labels = episodes.pooled()
        return F.cross_entropy(self._cosines(self.embed(images), self.base), labels)

    def start(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"head": class_means(unit(features), labels, classes)}

    def update(self, state: State, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        targets = one_hot(labels, classes)

        def loss(fast: State) -> Tensor:
            return cross_entropy(self.logits(fast, features), targets)

        descent = gradient(loss, state)["head"]
        return {"head": state["head"] - self.config.rate * (-2 * self.log_scale).exp() * descent}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return self._cosines(features, state["head"])

    def _cosines(self, features: Tensor, rows: Tensor) -> Tensor:
        """Scaled cosines (N, W) of features (N, D) to a row for each class (W, D)."""
        return self.log_scale.exp() * unit(features) @ unit(rows).t()


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [BaselinePlusPlus]
