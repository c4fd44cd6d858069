"""Meta-LSTM: a learned inner-loop optimiser, the gates of an LSTM cell whose cell state is the learner's weights.

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
    """A gate sigmoid(w · inputs + b), applied to each weight of the network, with w and b shared by all."""

    def __init__(self, inputs: int, start: float) -> None:
        """For this number of inputs, initialised with small weights, so that the gate is nearly `start`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs).uniform_(-0.01, 0.01))
        self.bias = nn.Parameter(torch.tensor(start).logit())

    def forward(self, *inputs: Tensor) -> Tensor:
        return sum((w * value for w, value in zip(self.weight, inputs, strict=True)), self.bias).sigmoid()


class MetaLSTM(GradientLearner):
    """Inner steps are theta <- forget * theta - input * gradient. The inputs of both gates are the gradient, the loss,
    theta, and the gate's previous value; theta's initial values are the learned initialisation.

    As in the paper, inner gradients and losses are constants in the outer gradient. The authors' code passes them
    through another LSTM of 20 units before the gates; the paper's equations do not, and neither does this.

    Good for research into learned optimisers: from a weight's gradient, the loss and the weight, it learns how much of
    the weight to keep and how far to move it.
    """

    name = "metalstm"

    class Config(GradientLearner.Config):
        steps: int = Field(5, ge=0, description="inner steps while meta-training")
        rate: float = Field(0.01, gt=0, lt=1, description="initial value of the input gate: an inner learning rate")
        keep: float = Field(0.999, gt=0, lt=1, description="initial value of the forget gate")

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
    """Magnitude and sign on comparable scales: (log|x| / p, sign x) if |x| > e^-p, else (-1, e^p x)."""
    return x.abs().clamp_min(math.exp(-_P)).log() / _P, (math.exp(_P) * x).clamp(-1, 1)


def _without_gates(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith((_INPUT, _FORGET))}


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MetaLSTM]
