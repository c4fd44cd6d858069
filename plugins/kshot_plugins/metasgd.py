"""Meta-SGD: MAML with a meta-learned learning rate per weight, which also determines the direction of inner steps.

Li, Zhou, Chen and Li, 2017. https://arxiv.org/abs/1707.09835
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kshot import Backbone, Learner, hookimpl
from kshot_plugins.gradient_learner import Descent


class MetaSGD(Descent):
    """Every scalar weight has its own rate, of either sign. The head has one per feature and one for the bias, shared
    by the classes, so that any number of ways works.

    The paper takes one step. The default here is two, since with a zero head the first step changes only the head.

    Good for episodes that one or two gradient steps can solve. It has twice MAML's parameters in training, and the same
    cost in serving.
    """

    name = "metasgd"

    class Config(Descent.Config):
        steps: int = Field(
            2, ge=0, description="inner steps in meta-training; with a zero head the first changes only the head"
        )
        lowest: float = Field(0.005, description="lower bound of the initial rates, drawn uniformly")
        highest: float = Field(0.1, description="upper bound of the initial rates")

        @model_validator(mode="after")
        def _is_a_range(self) -> Self:
            if self.lowest > self.highest:
                raise ValueError(f"lowest = {self.lowest} is above highest = {self.highest}")
            return self

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        shapes = [weight.shape for weight in self.weights().values()] + [(backbone.features,), ()]
        self.rates = nn.ParameterList(torch.empty(s).uniform_(config.lowest, config.highest) for s in shapes)

    def rates_at(self, i: Tensor) -> Sequence[Tensor]:
        return list(self.rates)


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MetaSGD]
