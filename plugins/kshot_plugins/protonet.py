"""Prototypical networks: a query belongs to the class whose mean support embedding is nearest.

Snell, Swersky and Zemel, 2017. https://arxiv.org/abs/1703.05175
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kshot import FeatureLearner, Learner, State, class_means, hookimpl, squared_distances


class ProtoNet(FeatureLearner):
    """Classes are their mean features; logits are negative squared Euclidean distances, as in the paper.

    A good first choice: any ways and shots, classes can be added and removed, and adapting takes one backbone pass.
    Weaker where novel classes differ much from the base classes, because no weight adapts to them.
    """

    name = "protonet"

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"prototypes": class_means(features, labels, classes)}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return -squared_distances(features, state["prototypes"])


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [ProtoNet]
