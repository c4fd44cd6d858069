"""Base class of gradient learners: a backbone and a linear head whose weights an inner loop adapts.

A zero head gives every class the same initial row, so any number of ways works, and the order of labels cannot leak
into the initialisation. (A learned shared row would cancel in the softmax, and so would its gradient.) Before the first
step all classes are equally likely, and the first step changes only the head.

A head of prototypes starts as a prototypical network's classifier: Triantafillou et al., 2020, Meta-Dataset, section 3.
https://arxiv.org/abs/1903.03096
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kshot import BY_ITSELF, InnerLoop, LearnerConfig, State, class_means, cross_entropy, gradient, one_hot

HEAD = ("head.weight", "head.bias")


class GradientLearner(InnerLoop):
    """Adapts all weights: `begin` gives the initial state, and subclasses implement `step`."""

    norms = ("support", "batch", "group", "running")

    class Config(LearnerConfig):
        steps: int = Field(1, ge=0, description="inner steps while meta-training")
        eval_steps: Annotated[int, Field(ge=0)] | dict[int, int] | None = Field(
            None, description="inner steps afterwards, or a table of them by shots; chosen on validation if unset"
        )
        head: Literal["zero", "prototypes"] = Field(
            "zero", description="the head before the first step: zeros, or each class's mean support feature"
        )
        length: float | None = Field(
            None, gt=0, description="length that features are scaled to before the head; unscaled if unset"
        )

    config: Config

    @property
    def steps(self) -> int:
        afterwards = self.config.eval_steps
        return self.config.steps if self.training or not isinstance(afterwards, int) else afterwards

    @property
    def steps_by_shots(self) -> Mapping[int, int]:
        table = self.config.eval_steps
        return table if isinstance(table, dict) and not self.training else {}

    @property
    def most_steps(self) -> int:
        return 2 * self.config.steps + 1 if self.config.eval_steps is None else 0

    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        prototypes = self.config.head == "prototypes"
        features = self.measure(support)[0] if prototypes else support.new_empty(0, self.backbone.features)
        weights = self.weights()
        if not torch.is_grad_enabled():  # a state then holds no parameters
            weights = {name: weight.detach() for name, weight in weights.items()}
        return weights | self.new_head(features, labels, classes)

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        own_batch = self.transductive or (self.training and self.backbone.norm == "batch")
        if own_batch or self.backbone.norm in BY_ITSELF:
            return state  # queries need no statistics
        _, statistics = self.measure(support, state)  # of the adapted weights
        return {**state, **statistics}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self.logits(state, self.embed(query, state))

    def new_head(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The initial head, weight (W, D) and bias (W,), for support features (S, D) and their labels.

        With prototypes m the logits are 2 m·x - |m|²: the negative squared distance up to a term equal for all classes.
        """
        ways = classes.shape[0]
        if self.config.head == "zero":
            weight, bias = features.new_zeros(ways, features.shape[1]), features.new_zeros(ways)
        else:
            means = class_means(self.scaled(features), labels, classes)
            weight, bias = 2 * means, -means.square().sum(1)
        return dict(zip(HEAD, (weight, bias), strict=True))

    def scaled(self, features: Tensor) -> Tensor:
        """Features (N, D) scaled to the configured length.

        This bounds the curvature of the loss: gradient descent of the head converges at rates below 4 / (length² + 1).
        """
        if self.config.length is None:
            return features
        return features * (self.config.length * (features.square().sum(1, keepdim=True) + 1e-6).rsqrt())

    def logits(self, state: State, features: Tensor) -> Tensor:
        """Logits (N, W) of features (N, D), by the state's head."""
        return self.scaled(features) @ state["head.weight"].t() + state["head.bias"]

    def support_loss(self, fast: State, support: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        """Mean cross-entropy of a support set with these weights, which inner steps minimise."""
        return cross_entropy(self.classify(fast, support), one_hot(labels, classes))

    def head_gradient(self, state: State, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The gradient of the support loss with respect to the head in closed form, for support features (S, D)."""
        errors = (self.logits(state, features).softmax(1) - one_hot(labels, classes)) / labels.shape[0]  # (S, W)
        return dict(zip(HEAD, (errors.t() @ self.scaled(features), errors.sum(0)), strict=True))


class Descent(GradientLearner):
    """Inner steps are gradient descent of the support loss, with a rate per weight tensor."""

    class Config(GradientLearner.Config):
        first_order: bool = Field(False, description="treat inner gradients as constants in the outer gradient")

    config: Config

    @abstractmethod
    def rates_at(self, i: Tensor) -> Sequence[Tensor]:
        """The learning rates of step i, in the order of the state's tensors."""

    @property
    def surrogate(self) -> bool:
        return self.config.first_order

    @property
    def closed_form_start(self) -> bool:
        return self.config.head == "zero"

    def first(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        if not self.closed_form_start:
            return super().first(state, support, labels, classes)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.first_order):
            gradients = self.head_gradient(state, self.embed(support, state), labels, classes)
        return self.descend(state, gradients, classes, labels.new_zeros(()))

    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        def loss(fast: State) -> Tensor:
            return self.support_loss(fast, support, labels, classes)

        return self.descend(state, gradient(loss, state, first_order=self.config.first_order), classes, i)

    def descend(self, state: State, gradients: Mapping[str, Tensor], classes: Tensor, i: Tensor) -> State:
        """The state after step i with these gradients; a tensor without a gradient is unchanged."""
        moved = dict(state)
        for (name, value), rate in zip(state.items(), self.rates_at(i), strict=True):
            if name in gradients:
                # A head row gets gradient mainly from its class, a share 1/W of the mean loss: times W compensates.
                share = rate * classes.shape[0] if name in HEAD else rate
                moved[name] = torch.addcmul(value, share, gradients[name], value=-1)
        return moved
