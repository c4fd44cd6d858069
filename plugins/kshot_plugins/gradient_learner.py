"""What learners by gradient share: a backbone and a linear head whose weights an inner loop moves.

Every class starts from one shared head row, so any number of ways fits, and no label order can leak into the
initialisation. What all rows share cancels in the softmax, at every step of gradient descent and in every derivative,
so the shared row is zero. Two things follow: before the first step every class is equally likely, and the first step
moves the head only.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kshot import InnerLoop, LearnerConfig, State, cross_entropy, one_hot

HEAD = ("head.weight", "head.bias")


class GradientLearner(InnerLoop):
    """All weights are fast weights: `begin` gives them, and a learner's own `step` says how they move."""

    norms = ("support", "batch", "group", "running")

    class Config(LearnerConfig):
        steps: int = Field(1, ge=0, description="inner steps while meta-training")
        eval_steps: int | None = Field(None, ge=0, description="inner steps afterwards; `steps` if unset")

    config: Config

    @property
    def steps(self) -> int:
        afterwards = self.config.eval_steps
        return self.config.steps if self.training or afterwards is None else afterwards

    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {**self.weights(), **self.new_head(support, classes)}

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        _, statistics = self.measure(support, state)  # of the adapted weights
        return {**state, **statistics}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self.logits(state, self.embed(query, state))

    def new_head(self, like: Tensor, classes: Tensor) -> State:
        """A head of zeros for so many classes: weight (W, D) and bias (W,)."""
        ways = classes.shape[0]
        weight, bias = like.new_zeros(ways, self.backbone.features), like.new_zeros(ways)
        return dict(zip(HEAD, (weight, bias), strict=True))

    def logits(self, state: State, features: Tensor) -> Tensor:
        """What the state's head makes of features (N, D): (N, W)."""
        return features @ state["head.weight"].t() + state["head.bias"]

    def support_loss(self, fast: State, support: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        """The mean cross-entropy of a support set with these weights: what inner steps descend."""
        return cross_entropy(self.classify(fast, support), one_hot(labels, classes))
