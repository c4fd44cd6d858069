"""Relation networks: a learned relation module scores pairs of the feature maps of a query and a class.

Sung et al., 2018. https://arxiv.org/abs/1711.06025
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kshot import (
    Backbone,
    FeatureLearner,
    Learner,
    LearnerConfig,
    Norm,
    State,
    class_means,
    cross_entropy,
    hookimpl,
    make_norm,
    one_hot,
)


class RelationNet(FeatureLearner):
    """Logits are relation scores before the sigmoid: log-odds that query and class match. The paper fits the sigmoid to
    1 or 0 by squared error.

    Differs from the paper: a class's map is the mean of its images' maps and not their sum, so that its scale does not
    depend on the shots.

    Good for images in which positions matter, because it compares feature maps with a learned similarity. The cost
    grows with queries times ways.
    """

    name = "relation"

    class Config(LearnerConfig):
        loss: Literal["mse", "cross_entropy"] = Field(
            "mse",
            description="squared error of each pair's sigmoid, as in the paper, or cross-entropy of logits",
        )
        width: int = Field(64, ge=1, le=4096, description="channels of the relation module")
        hidden: int = Field(8, ge=1, le=4096, description="width of the relation module's hidden dense layer")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        channels, height, width = self.grid = backbone.grid or (backbone.features, 1, 1)
        # A convolution of two concatenated maps is the sum of a convolution of each: so the module's first layer runs
        # once for each class and each query, and not for each pair.
        self.of_class = nn.Conv2d(channels, config.width, 3, padding=1, bias=False)
        self.of_query = nn.Conv2d(channels, config.width, 3, padding=1, bias=False)
        # Batch statistics over pairs would make a query's score depend on the other queries.
        norm: Norm = "running" if backbone.norm == "running" else "group"
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

    @property
    def batched(self) -> bool:  # type: ignore[override]  # running averages are not
        return self.backbone.norm != "running"

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"class_features": class_means(features, labels, classes)}

    def logits(self, state: State, features: Tensor) -> Tensor:
        of_query = self.of_query(features.unflatten(1, self.grid))  # (Q, width, h, w)
        of_class = self.of_class(state["class_features"].unflatten(1, self.grid))  # (W, width, h, w)
        pairs = of_query[:, None] + of_class[None, :]  # (Q, W, width, h, w)
        return self.relate(pairs.flatten(0, 1)).view(pairs.shape[:2])

    def episode_loss(
        self, support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, classes: Tensor
    ) -> Tensor:
        """The mean loss over all pairs of a query and a class."""
        scores = self.logits(self.fit(support, support_labels, classes), query)
        targets = one_hot(query_labels, classes).to(scores.dtype)
        mse = self.config.loss == "mse"
        return F.mse_loss(scores.sigmoid(), targets) if mse else cross_entropy(scores, targets)


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [RelationNet]
