"""MAML: an initialisation from which a few gradient steps on the support set give a good classifier.

Finn, Abbeel and Levine, 2017. https://arxiv.org/abs/1703.03400
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import Backbone, Learner, hookimpl
from kshot_plugins.gradient_learner import HEAD, Descent


class MAML(Descent):
    """Inner steps are gradient descent of the support loss on all weights. The outer gradient differentiates through
    them, unless `first_order`.

    Good for new classes that are unlike the base classes, because every weight adapts. Training and adapting cost more
    than with a metric learner. Train it with all numbers of shots that it will be used with.
    """

    name = "maml"

    class Config(Descent.Config):
        steps: int = Field(
            2, ge=0, description="inner steps in meta-training; with a zero head the first changes only the head"
        )
        rate: float = Field(0.04, gt=0, description="inner learning rate of the backbone, on the mean cross-entropy")
        head_rate: float = Field(
            0.4, gt=0, description="inner learning rate of the head, multiplied by the number of ways"
        )
        learn_rate: bool = Field(False, description="meta-learn a rate for each weight tensor, starting at these")
        per_step: bool = Field(False, description="separate rates for each of `steps` steps, as in MAML++")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        rates = torch.tensor([config.rate] * len(self.weights()) + [config.head_rate] * len(HEAD)).log()
        if config.per_step:
            rates = rates.repeat(max(1, config.steps), 1)  # (steps, tensors)
        self.log_rates = nn.Parameter(rates) if config.learn_rate else nn.Buffer(rates)

    def rates_at(self, i: Tensor) -> Sequence[Tensor]:
        rates = self.log_rates.exp()
        if self.config.per_step:  # steps beyond `steps` use the last one's rates
            rates = rates.index_select(0, i.clamp(max=rates.shape[0] - 1)[None])[0]
        return rates.unbind()


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MAML]
