"""MAML: an initialisation from which a few gradient steps on the support set give a good classifier.

Finn, Abbeel and Levine, 2017. https://arxiv.org/abs/1703.03400
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import Backbone, InnerLoop, Learner, LearnerConfig, State, cross_entropy, gradient, hookimpl, one_hot
from kshot.norms import Norm


class MAML(InnerLoop):
    """All weights are fast weights. Every class starts from one shared head row, so any number of ways fits, no label
    order can leak into the initialisation, and before the first step every class is equally likely.
    """

    name = "maml"

    class Config(LearnerConfig):
        norm: Norm = "support"
        steps: int = Field(1, ge=0, description="inner steps while meta-training")
        eval_steps: int = Field(3, ge=0, description="inner steps afterwards")
        rate: float = Field(0.4, gt=0, description="inner learning rate, for a loss that sums over the classes")
        learn_rate: bool = Field(False, description="meta-learn a rate for each weight tensor, starting at `rate`")
        first_order: bool = Field(False, description="ignore that the inner gradient depends on the initialisation")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        self.row = nn.Parameter(torch.zeros(backbone.features))  # the head's row of every class
        rates = torch.full((len(self.initial(1)),), math.log(config.rate))
        self.log_rates = nn.Parameter(rates) if config.learn_rate else nn.Buffer(rates)

    @property
    def steps(self) -> int:
        return self.config.steps if self.training else self.config.eval_steps

    def initial(self, ways: int) -> State:
        return {
            **self.weights(),
            "head.weight": self.row.expand(ways, -1),  # (W, D)
            "head.bias": self.row.new_zeros(ways),
        }

    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return self.initial(classes.shape[0])

    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        targets = one_hot(labels, classes)

        def loss(fast: State) -> Tensor:
            # The authors' scale: a sum over classes of each class's mean, so one rate suits any number of ways.
            return cross_entropy(self.classify(fast, support), targets) * classes.shape[0]

        gradients = gradient(loss, state, first_order=self.config.first_order)
        rates = self.log_rates.exp()
        return {name: value - rates[k] * gradients[name] for k, (name, value) in enumerate(state.items())}

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        _, statistics = self.measure(support, state)  # of the adapted weights
        return {**state, **statistics}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self.embed(query, state) @ state["head.weight"].t() + state["head.bias"]


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MAML]
