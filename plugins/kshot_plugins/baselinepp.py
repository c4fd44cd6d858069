"""Baseline++: fine-tuning with cosine classifiers, both for class training and for the head of each episode.

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
    """Logits are cosines between a feature and a row per class, times a scale.

    Differs from the paper: an episode's rows start at the class means of unit support features and not at random, so
    adapting is deterministic, and with zero steps it is nearest class mean by cosine.

    Good for features of a class-trained or pretrained backbone whose norms carry little information. It starts as
    nearest class mean by cosine, and gradient steps improve on it if there are several shots.
    """

    name = "baselinepp"
    coupled = ("running", "support", "batch")  # class training embeds all images of a batch together

    class Config(LearnerConfig):
        steps: int = Field(100, ge=0, description="gradient steps for an episode's head")
        rate: float = Field(
            1.0, gt=0, le=4, description="learning rate of the head, divided by scale²; above 4 it may diverge"
        )
        scale: float = Field(10.0, gt=0, description="logits per unit of cosine")
        learn_scale: bool = Field(False, description="learn the scale in class training, starting at `scale`")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        log_scale = torch.tensor(config.scale).log()
        self.log_scale = nn.Parameter(log_scale) if config.learn_scale else nn.Buffer(log_scale)

    @property
    def steps(self) -> int:
        return self.config.steps

    def prepare(self, classes: Sequence[int]) -> None:
        """Initial rows for the base classes: unit vectors that are nearly equal, so the features' common mean cancels.

        Features after a ReLU lie in a narrow cone, towards which random rows would first have to be trained.
        """
        common = torch.ones(self.backbone.features) / self.backbone.features**0.5
        self.base = nn.Parameter(common + 0.001 * torch.randn(sum(classes), self.backbone.features))

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """Cross-entropy over all base classes, averaged over the support and query images of the episodes."""
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
        """Scaled cosines (N, W) between features (N, D) and class rows (W, D)."""
        return self.log_scale.exp() * unit(features) @ unit(rows).t()


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [BaselinePlusPlus]
