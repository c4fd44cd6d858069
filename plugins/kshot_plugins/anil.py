"""ANIL (almost no inner loop): MAML whose inner loop adapts only the head; the backbone learns in the outer loop.

Raghu, Raghu, Bengio and Vinyals, 2020. https://arxiv.org/abs/1909.09157
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import Backbone, FeatureLoop, Learner, State, hookimpl
from kshot_plugins.gradient_learner import HEAD, GradientLearner


class ANIL(FeatureLoop, GradientLearner):
    """Inner steps are gradient descent of the support loss on the head only. The outer gradient reaches the backbone
    through the query features and, to second order, through the support features from which the head was fitted.

    Good for adapting by gradient at a fraction of MAML's cost: the backbone is fixed, so an image is embedded once for
    all label spaces, and a step updates only the head.
    """

    name = "anil"

    class Config(GradientLearner.Config):
        steps: int = Field(5, ge=0, description="inner steps while meta-training")
        rate: float = Field(0.03, gt=0, description="inner learning rate, multiplied by the number of ways")
        learn_rate: bool = Field(False, description="meta-learn the inner learning rate, starting at this one")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        rate = torch.tensor(config.rate).log()
        self.log_rate = nn.Parameter(rate) if config.learn_rate else nn.Buffer(rate)

    def start(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return self.new_head(features, labels, classes)

    def update(self, state: State, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        gradients = self.head_gradient(state, features, labels, classes)
        # A row gets gradient mainly from its class, a share 1/W of the mean loss: the factor W compensates.
        rate = self.log_rate.exp() * classes.shape[0]
        return {name: state[name] - rate * gradients[name] for name in HEAD}


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [ANIL]
