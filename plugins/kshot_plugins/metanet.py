"""Meta Networks: weights generated from the loss gradients of support examples, and read from a memory by attention.

Munkhdalai and Yu, 2017. https://arxiv.org/abs/1703.00837
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import Backbone, FeatureLearner, Learner, LearnerConfig, State, class_means, hookimpl, one_hot, unit
from kshot_plugins.metalstm import preprocessed


class MetaNet(FeatureLearner):
    """Dense layers have slow weights, learned in meta-training, and fast weights, generated in each episode.

    Two small networks generate them, each from a gradient coordinate by coordinate. `embedding` makes keys: its fast
    weights come from the mean gradient of the support set's representation loss. `base` classifies: each support image
    has its own fast weights, from the gradient of its own loss. They are a memory, indexed by the support images' keys;
    a query reads the mean of all, weighted by a softmax of its key's cosines to them. Layer augmentation adds up what a
    layer gives with slow and with fast weights, each after its ReLU. In the outer gradient, the support gradients are
    constants.

    Differs from the paper: the convolutional layers, which the backbone shares between both networks, have slow weights
    only. A class's slow output row is its mean hidden vector, because rows learned for each place in a list of labels
    would fix the number of ways; both losses are cross-entropy by the nearest of these means. The mean gradient
    replaces an LSTM over gradients, so that the order of the support set does not matter. Cosines are multiplied by
    `sharpness`.

    Good for research into generated weights. The state grows with the support set, by all fast weights of each image.
    """

    name = "metanet"

    class Config(LearnerConfig):
        width: int = Field(64, ge=1, le=1024, description="size of keys and of the hidden layer")
        generator: int = Field(20, ge=1, le=1024, description="hidden units of the networks that generate weights")
        sharpness: float = Field(10.0, gt=0, description="factor on cosines before the softmax")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        self.embedding = nn.Linear(backbone.features, config.width)
        self.base = nn.Linear(backbone.features, config.width)
        self.generate_embedding, self.generate_base = (
            nn.Sequential(nn.Linear(2, config.generator), nn.ReLU(), nn.Linear(config.generator, 1)) for _ in range(2)
        )

    @property
    def surrogate(self) -> bool:
        return True

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        members = one_hot(labels, classes).to(features.dtype)  # (S, W)

        def gradients(layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Gradients of each image's loss by layer output (S, H) and by rows (S, W, H); hidden (S, H), means."""
            hidden = layer(features).relu()
            means = class_means(hidden, labels, classes)  # (W, H)
            errors = nearest_mean(hidden, means).softmax(1) - members  # (S, W)
            slope = 2 * hidden.shape[1] ** -0.5 * errors
            return (slope @ means) * (hidden > 0), slope[:, :, None] * hidden[:, None], hidden, means

        by_output, _, _, _ = gradients(self.embedding)
        mean = by_output.t() @ features / features.shape[0]  # (H, D)
        state = {"embedding": self._generated(self.generate_embedding, mean)}
        by_output, by_rows, _, means = gradients(self.base)
        return {
            **state,
            "keys": self._keys(state, features),  # (S, H)
            "hidden": self._generated(self.generate_base, by_output[:, :, None] * features[:, None]),  # (S, H, D)
            "rows": self._generated(self.generate_base, by_rows),  # (S, W, H)
            "means": means,  # (W, H)
        }

    def logits(self, state: State, features: Tensor) -> Tensor:
        cosines = unit(self._keys(state, features)) @ unit(state["keys"]).t()
        attention = (self.config.sharpness * cosines).softmax(1)  # (Q, S)
        fast = (attention @ state["hidden"].flatten(1)).unflatten(1, state["hidden"].shape[1:])  # (Q, H, D)
        rows = (attention @ state["rows"].flatten(1)).unflatten(1, state["rows"].shape[1:])  # (Q, W, H)
        hidden = self.base(features).relu() + (fast @ features[:, :, None])[:, :, 0].relu()
        return nearest_mean(hidden, state["means"]) + (rows @ hidden[:, :, None])[:, :, 0]

    def _keys(self, state: State, features: Tensor) -> Tensor:
        return self.embedding(features).relu() + (features @ state["embedding"].t()).relu()

    def _generated(self, generator: nn.Sequential, gradient: Tensor) -> Tensor:
        """Fast weights from a gradient of any shape."""
        seen = torch.stack(preprocessed(gradient.detach()), -1)
        weights: Tensor = generator(seen)[..., 0]
        return weights


def nearest_mean(hidden: Tensor, means: Tensor) -> Tensor:
    """Logits (N, W) of the linear layer that classifies by the nearest of the means (W, H)."""
    return hidden.shape[1] ** -0.5 * (2 * hidden @ means.t() - means.square().sum(1))


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MetaNet]
