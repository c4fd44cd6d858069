"""Nearest class mean by cosine on frozen features: the baseline for all other heads.

As in the evaluation of Chen, Liu, Xu, Darrell and Wang, 2021 ("Classifier-Baseline"). https://arxiv.org/abs/2003.04390
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from kshot import FeatureLearner, Learner, LearnerConfig, State, class_means, hookimpl, unit


class Cosine(FeatureLearner):
    """Logits are cosines to the class means of unit features, times a scale.

    Good as the baseline on any backbone. It uses no statistics of the base classes; `whitened` and `plda` do.
    """

    name = "cosine"

    class Config(LearnerConfig):
        scale: float = Field(10.0, gt=0, description="logits per unit of cosine")

    config: Config

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"directions": unit(class_means(unit(features), labels, classes))}  # (W, D)

    def logits(self, state: State, features: Tensor) -> Tensor:
        return self.config.scale * unit(features) @ state["directions"].t()


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [Cosine]
