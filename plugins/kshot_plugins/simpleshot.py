"""SimpleShot: class training on the base classes, then nearest class mean on centred, L2-normalised features.

Wang, Chao, Weinberger and van der Maaten, 2019. https://arxiv.org/abs/1911.04623
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from kshot import (
    Backbone,
    Episodes,
    FeatureLearner,
    Learner,
    LearnerConfig,
    State,
    class_means,
    hookimpl,
    squared_distances,
    unit,
)
from kshot_plugins.class_training import BaseHead


class SimpleShot(FeatureLearner):
    """Logits are negative squared distances to the class means of transformed features.

    Features are centred by the mean over the base classes, not over an episode. As features change in training, the
    mean is taken over the last batches of class training.

    Good as a simple baseline for any backbone.
    """

    name = "simpleshot"
    coupled = Learner.norms  # by class training on all images of a batch

    class Config(LearnerConfig):
        transform: Literal["un", "l2n", "cl2n"] = Field(
            "cl2n",
            description="of features: none, to unit length, or centred and then to unit length; "
            "with training.steps = 0 there is no mean to centre by, and cl2n is l2n",
        )
        memory: int = Field(100, ge=1, description="batches of class training over which the mean feature is taken")

    config: Config
    centre: Tensor
    batches: Tensor

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        self.register_buffer("centre", torch.zeros(backbone.features))
        self.register_buffer("batches", torch.tensor(0))

    def prepare(self, classes: Sequence[int]) -> None:
        self.base = BaseHead(self.backbone.features, classes)

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """Cross-entropy over all base classes, averaged over the support and query images of the episodes."""
        images, labels = episodes.pooled()
        features = self.embed(images)  # (N, D)
        if self.training:
            self.batches += 1
            mean = features.detach().mean(0)
            # The plain mean of the first batches, then one that forgets: a batch's share falls to 1/e in `memory` more
            self.centre += (mean - self.centre) / self.batches.clamp(max=self.config.memory)
        return F.cross_entropy(self.base(features), labels)

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"means": class_means(self._transformed(features), labels, classes)}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return -squared_distances(self._transformed(features), state["means"])

    def _transformed(self, features: Tensor) -> Tensor:
        if self.config.transform == "un":
            return features
        return unit(features - self.centre if self.config.transform == "cl2n" else features)


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [SimpleShot]
