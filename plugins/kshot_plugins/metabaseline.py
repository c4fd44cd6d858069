"""Meta-Baseline: class training on the base classes, then meta-training by cosine to the class means.

Chen, Liu, Xu, Darrell and Wang, 2021. https://arxiv.org/abs/2003.04390
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kshot import Backbone, Episodes, FeatureLearner, Learner, LearnerConfig, State, class_means, hookimpl, unit
from kshot_plugins.class_training import BaseHead


class MetaBaseline(FeatureLearner):
    """Logits are cosines between a feature and the classes' mean features, times a learned temperature.

    The number of outer steps, kept in checkpoints, determines the stage.

    Good for many labelled base classes: class training gives strong features cheaply, and meta-training then optimises
    them for cosine classification. Adapting is a mean, as with prototypes.
    """

    name = "metabaseline"
    coupled = Learner.norms  # by class training on all images of a batch

    class Config(LearnerConfig):
        pretrain: int = Field(
            1000, ge=0, description="batches of class training; all outer steps that follow are meta-training"
        )
        temperature: float = Field(10.0, gt=0, description="initial factor on cosines")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.taken = 0

    def prepare(self, classes: Sequence[int]) -> None:
        self.base = BaseHead(self.backbone.features, classes)

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """In class training cross-entropy of all images over the base classes, then of queries over their episode's."""
        if self.stage == 0:
            images, labels = episodes.pooled()
            return F.cross_entropy(self.base(self.embed(images)), labels)
        return super().meta_loss(episodes)

    def stepped(self) -> None:
        self.taken += 1

    @property
    def stage(self) -> int:
        return int(self.taken >= self.config.pretrain)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.taken)

    def set_extra_state(self, state: Tensor) -> None:
        self.taken = int(state)

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"means": class_means(features, labels, classes)}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return self.temperature * unit(features) @ unit(state["means"]).t()


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MetaBaseline]
