"""Meta-Baseline: train a classifier of the base classes, then meta-train its features by angle to the class means.

Chen, Liu, Xu, Darrell and Wang, 2021. https://arxiv.org/abs/2003.04390
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kshot import Backbone, Episodes, Learner, LearnerConfig, State, cross_entropy, hookimpl, one_hot
from kshot.learner import class_means
from kshot_plugins.class_training import BaseHead


class MetaBaseline(Learner):
    """Logits are cosines between a feature and the classes' mean features, times a learned temperature.

    The outer steps are counted in a buffer, which tells the two stages apart: a run that resumes goes on in its own.

    Good for many labelled base classes: class training makes strong features cheaply, and meta-training then fits them
    to the cosine that answers. Adapting is a mean, as with prototypes.
    """

    name = "metabaseline"

    class Config(LearnerConfig):
        pretrain: int = Field(
            1000, ge=0, description="batches of class training; all outer steps that follow are meta-training"
        )
        temperature: float = Field(10.0, gt=0, description="what cosines are multiplied by at first")

    config: Config
    taken: Tensor

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.register_buffer("taken", torch.tensor(0))

    def prepare(self, classes: Sequence[int]) -> None:
        self.base = BaseHead(self.backbone.features, classes)

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """First cross-entropy over all base classes, of all images; then of the queries, over their episode's."""
        if bool(self.taken < self.config.pretrain):
            images, labels = episodes.pooled()
            return F.cross_entropy(self.base(self.embed(images)), labels)
        losses = []
        for episode, support, query in self.embed_episodes(episodes):
            means = class_means(support, episode.support_labels, episode.classes)
            losses.append(cross_entropy(self._logits(means, query), one_hot(episode.query_labels, episode.classes)))
        return torch.stack(losses).mean()

    def stepped(self) -> None:
        self.taken += 1

    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        features, statistics = self.measure(support)
        return {"means": class_means(features, labels, classes), **statistics}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self._logits(state["means"], self.embed(query, state))

    def _logits(self, means: Tensor, query: Tensor) -> Tensor:
        """(Q, W) from mean features (W, D) and queries' features (Q, D)."""
        return self.temperature * F.normalize(query, dim=1) @ F.normalize(means, dim=1).t()


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MetaBaseline]
