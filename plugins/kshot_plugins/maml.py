"""MAML: an initialisation from which a few gradient steps on the support set give a good classifier.

Finn, Abbeel and Levine, 2017. https://arxiv.org/abs/1703.03400
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import Backbone, InnerLoop, Learner, LearnerConfig, State, cross_entropy, gradient, hookimpl, one_hot
from kshot.norms import Norm

_HEAD = ("head.weight", "head.bias")


class MAML(InnerLoop):
    """All weights are fast weights. Every class starts from one shared head row, so any number of ways fits, and no
    label order can leak into the initialisation.

    What all rows share cancels in the softmax, at every step and in every derivative, so the shared row is zero. Two
    things follow: before the first step every class is equally likely, and the first step moves the head only.
    """

    name = "maml"

    class Config(LearnerConfig):
        norm: Norm = "support"
        steps: int = Field(1, ge=0, description="inner steps while meta-training")
        eval_steps: int | None = Field(None, ge=0, description="inner steps afterwards; `steps` if unset")
        rate: float = Field(0.04, gt=0, description="inner learning rate of the backbone, on the mean cross-entropy")
        head_rate: float = Field(0.4, gt=0, description="inner learning rate of the head, taken times the ways")
        learn_rate: bool = Field(False, description="meta-learn a rate for each weight tensor, starting at these")
        first_order: bool = Field(False, description="ignore that the inner gradient depends on the initialisation")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        rates = torch.tensor([config.rate] * len(self.weights()) + [config.head_rate] * len(_HEAD)).log()
        self.log_rates = nn.Parameter(rates) if config.learn_rate else nn.Buffer(rates)

    @property
    def surrogate(self) -> bool:
        return self.config.first_order

    @property
    def steps(self) -> int:
        afterwards = self.config.eval_steps
        return self.config.steps if self.training or afterwards is None else afterwards

    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        ways = classes.shape[0]
        weight, bias = self.log_rates.new_zeros(ways, self.backbone.features), self.log_rates.new_zeros(ways)
        return {**self.weights(), **dict(zip(_HEAD, (weight, bias), strict=True))}

    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        targets = one_hot(labels, classes)

        def loss(fast: State) -> Tensor:
            return cross_entropy(self.classify(fast, support), targets)

        gradients = gradient(loss, state, first_order=self.config.first_order)
        rates = self.log_rates.exp()
        return {
            # A head row learns from its own class, a share 1/W of the mean loss: its rate makes up for that.
            name: value - rates[k] * (classes.shape[0] if name in _HEAD else 1) * gradients[name]
            for k, (name, value) in enumerate(state.items())
        }

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        _, statistics = self.measure(support, state)  # of the adapted weights
        return {**state, **statistics}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self.embed(query, state) @ state["head.weight"].t() + state["head.bias"]


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MAML]
