"""Meta-SGD: meta-learn the initialisation and a learning rate for every weight, so also the direction of inner steps.

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
    """Every scalar weight has its own rate, of either sign. The head's are one for each feature and one for the
    bias, shared by the classes, so that any ways fit.

    The paper takes one step. Here the first step moves the head only, whose rows start at zero, so two are the default.

    Good for episodes that a gradient step or two can solve, if each weight knows how far to go. It has twice MAML's
    weights to learn, and serves like MAML.
    """

    name = "metasgd"

    class Config(Descent.Config):
        steps: int = Field(2, ge=0, description="inner steps while meta-training; the first moves the head only")
        lowest: float = Field(0.005, description="initial rates are drawn evenly between this")
        highest: float = Field(0.1, description="and this")

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
