"""Relation networks: a small network, trained along, judges how well a query's map and a class's map go together.

Sung et al., 2018. https://arxiv.org/abs/1711.06025
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kshot import Backbone, Episodes, Learner, LearnerConfig, State, cross_entropy, hookimpl, one_hot
from kshot.learner import class_means
from kshot.norms import Norm, make_norm


class RelationNet(Learner):
    """A relation score for every pair of query and class; its sigmoid is what the paper fits to 1 or 0.

    Logits are the scores before the sigmoid: log-odds that the pair belongs together, so that among classes of which
    exactly one is right, their softmax is its probability.

    The paper adds up the maps of a class's images. Their mean, here, is the same to the next layer as long as every
    class has one number of shots, and is all that stays on one scale when shots vary.

    Good for images whose places matter, as it compares maps and not vectors, by a measure that it learns. Work grows
    with queries times ways, so a hundred classes cost a hundred comparisons.
    """

    name = "relation"

    class Config(LearnerConfig):
        loss: Literal["mse", "cross_entropy"] = Field(
            "mse", description="of the sigmoid of each pair's score to 1 or 0, as in the paper; or of the logits"
        )
        width: int = Field(64, ge=1, le=4096, description="channels of the relation module")
        hidden: int = Field(8, ge=1, le=4096, description="width of its last but one layer")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        channels, height, width = self.grid = backbone.grid or (backbone.features, 1, 1)
        # A convolution over two maps, one on top of the other, is a convolution of each, added up: so the module's
        # first one runs once for every class and every query, and not for every pair.
        self.of_class = nn.Conv2d(channels, config.width, 3, padding=1, bias=False)
        self.of_query = nn.Conv2d(channels, config.width, 3, padding=1, bias=False)
        # Statistics over the pairs of one call would let queries decide about each other: averages, or each pair's own.
        norm: Norm = "running" if config.norm == "running" else "group"
        layers: list[nn.Module] = []
        for block in range(2):
            if block:
                layers.append(nn.Conv2d(config.width, config.width, 3, padding=1, bias=False))
            layers += [make_norm(norm, config.width), nn.ReLU()]
            if min(height, width) > 1:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(config.width * height * width, config.hidden), nn.ReLU()]
        self.relate = nn.Sequential(*layers, nn.Linear(config.hidden, 1))

    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        features, statistics = self.measure(support)
        return {"class_features": class_means(features, labels, classes), **statistics}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self.scores(self.embed(query, state), state["class_features"])

    def scores(self, query: Tensor, classes: Tensor) -> Tensor:
        """Relation scores (Q, W), before the sigmoid, of features (Q, D) and those of the classes (W, D)."""
        of_query = self.of_query(query.unflatten(1, self.grid))  # (Q, width, h, w)
        of_class = self.of_class(classes.unflatten(1, self.grid))  # (W, width, h, w)
        pairs = of_query[:, None] + of_class[None, :]  # (Q, W, width, h, w)
        return self.relate(pairs.flatten(0, 1)).view(pairs.shape[:2])

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """The mean loss of all pairs of a query and a class."""
        losses = []
        for episode, support, query in self.embed_episodes(episodes):
            classes = class_means(support, episode.support_labels, episode.classes)
            scores = self.scores(query, classes)
            targets = one_hot(episode.query_labels, episode.classes).to(scores.dtype)
            mse = self.config.loss == "mse"
            losses.append(F.mse_loss(scores.sigmoid(), targets) if mse else cross_entropy(scores, targets))
        return torch.stack(losses).mean()


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [RelationNet]
