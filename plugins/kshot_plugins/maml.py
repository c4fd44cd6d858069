"""MAML: an initialisation from which a few gradient steps on the support set give a good classifier.

Finn, Abbeel and Levine, 2017. https://arxiv.org/abs/1703.03400
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import Backbone, Learner, State, gradient, hookimpl
from kshot_plugins.gradient_learner import HEAD, GradientLearner


class MAML(GradientLearner):
    """All weights descend the support loss; the outer gradient goes through that descent, unless told `first_order`.

    Good for new classes that are unlike the base classes, because every weight adapts to them. It costs more than a
    metric learner, in training and in adapting, and loses at other shots than those it was trained at.
    """

    name = "maml"

    class Config(GradientLearner.Config):
        steps: int = Field(2, ge=0, description="inner steps while meta-training; the first moves the head only")
        rate: float = Field(0.04, gt=0, description="inner learning rate of the backbone, on the mean cross-entropy")
        head_rate: float = Field(0.4, gt=0, description="inner learning rate of the head, taken times the ways")
        learn_rate: bool = Field(False, description="meta-learn a rate for each weight tensor, starting at these")
        first_order: bool = Field(False, description="ignore that the inner gradient depends on the initialisation")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        rates = torch.tensor([config.rate] * len(self.weights()) + [config.head_rate] * len(HEAD)).log()
        self.log_rates = nn.Parameter(rates) if config.learn_rate else nn.Buffer(rates)

    @property
    def surrogate(self) -> bool:
        return self.config.first_order

    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        def loss(fast: State) -> Tensor:
            return self.support_loss(fast, support, labels, classes)

        gradients = gradient(loss, state, first_order=self.config.first_order)
        rates = self.log_rates.exp()
        return {
            # A head row learns from its own class, a share 1/W of the mean loss: its rate makes up for that.
            name: value - rates[k] * (classes.shape[0] if name in HEAD else 1) * gradients[name]
            for k, (name, value) in enumerate(state.items())
        }


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MAML]
