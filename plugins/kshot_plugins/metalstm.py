"""Meta-LSTM: the inner loop's optimiser is learned, as the gates of an LSTM cell whose memory is the weights.

Ravi and Larochelle, 2017: Optimization as a Model for Few-Shot Learning. https://openreview.net/forum?id=rJY0-Kcll
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import Backbone, Learner, State, hookimpl, value_and_gradient
from kshot_plugins.gradient_learner import HEAD, GradientLearner

_INPUT, _FORGET = "input_gate.", "forget_gate."
_P = 10.0  # what the paper's preprocessing divides logarithms by


class Gate(nn.Module):
    """sigmoid(w · inputs + b) for every weight of the network by itself, with the same w and b for all of them."""

    def __init__(self, inputs: int, start: float) -> None:
        """Of so many inputs, of which each counts for little at first: the gate is then nearly `start`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs).uniform_(-0.01, 0.01))
        self.bias = nn.Parameter(torch.tensor(start).logit())

    def forward(self, *inputs: Tensor) -> Tensor:
        return sum((w * value for w, value in zip(self.weight, inputs, strict=True)), self.bias).sigmoid()


class MetaLSTM(GradientLearner):
    """theta <- forget * theta - input * gradient. Both gates look at the gradient, the loss, theta and at what they
    were a step before; theta's initial values are the learned initialisation.

    As in the paper, the outer gradient takes the inner gradients and losses for constants. The authors pass them
    through another LSTM of 20 units before the gates; the paper's equations, and we, do not.

    Good for research into learned optimisers: what it learns, from a weight's gradient, the loss and the weight itself,
    is how much of the weight to keep and how far to move it.
    """

    name = "metalstm"

    class Config(GradientLearner.Config):
        steps: int = Field(5, ge=0, description="inner steps while meta-training")
        rate: float = Field(0.01, gt=0, lt=1, description="where the input gate starts: an inner learning rate")
        keep: float = Field(0.999, gt=0, lt=1, description="where the forget gate starts")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        self.input_gate, self.forget_gate = Gate(6, config.rate), Gate(6, config.keep)

    @property
    def surrogate(self) -> bool:
        return True

    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        fast = super().begin(support, labels, classes)
        return {**fast, **{gate + name: torch.zeros_like(w) for gate in (_INPUT, _FORGET) for name, w in fast.items()}}

    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        def loss(fast: State) -> Tensor:
            return self.support_loss(fast, support, labels, classes)

        value, gradients = value_and_gradient(loss, _without_gates(state), first_order=True)
        moved = {}
        for name, slope in gradients.items():
            # A head row learns from its own class, a share 1/W of the mean loss.
            slope = slope * (classes.shape[0] if name in HEAD else 1)
            seen = (*preprocessed(slope), *preprocessed(value), state[name])
            moved[_INPUT + name] = self.input_gate(*seen, state[_INPUT + name])
            moved[_FORGET + name] = self.forget_gate(*seen, state[_FORGET + name])
            moved[name] = moved[_FORGET + name] * state[name] - moved[_INPUT + name] * slope
        return moved

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return super().finish(_without_gates(state), support, labels, classes)


def preprocessed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Size and sign, of any magnitude: (log|x| / p, sign x) where |x| is over e^-p, and (-1, e^p x) below."""
    return x.abs().clamp_min(math.exp(-_P)).log() / _P, (math.exp(_P) * x).clamp(-1, 1)


def _without_gates(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith((_INPUT, _FORGET))}


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MetaLSTM]
