"""Prototypical networks: a query belongs to the class whose mean support embedding is nearest.

Snell, Swersky and Zemel, 2017. https://arxiv.org/abs/1703.05175
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kshot import Episodes, Learner, LearnerConfig, State, cross_entropy, hookimpl, one_hot
from kshot.learner import class_means, squared_distances


class ProtoNet(Learner):
    """Classes are their mean features; logits are negative squared Euclidean distances, as in the paper.

    Good for a first try at anything: any ways and shots, classes that come and go, and adapting that takes one pass of
    the backbone. Less so where the new classes are unlike the base classes, because no weight adapts to them.
    """

    name = "protonet"

    class Config(LearnerConfig):
        pass

    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        features, statistics = self.measure(support)
        return {"prototypes": class_means(features, labels, classes), **statistics}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return -squared_distances(self.embed(query, state), state["prototypes"])

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """One pass of the backbone over every image, as the authors train: batch statistics are then of all of them."""
        losses = []
        for episode, support, query in self.embed_episodes(episodes):
            prototypes = class_means(support, episode.support_labels, episode.classes)
            targets = one_hot(episode.query_labels, episode.classes)
            losses.append(cross_entropy(-squared_distances(query, prototypes), targets))
        return torch.stack(losses).mean()


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [ProtoNet]
