"""The inner loop's gradient: one helper to meta-train through, to evaluate without a graph, and to trace to ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def gradient(
    loss: Callable[[dict[str, Tensor]], Tensor], fast: Mapping[str, Tensor], *, first_order: bool = False
) -> dict[str, Tensor]:
    """The gradient of a scalar `loss(fast)` with respect to each tensor of `fast`, under the same names.

    While meta-training (gradients enabled, and `fast` descends from parameters) the result can be differentiated
    again, which makes the outer gradient second order; `first_order` drops that. Elsewhere no graph outlives the
    call. A tensor that the loss does not touch gets zeros.

        grads = gradient(lambda fast: cross_entropy(logits(fast, support), targets), state)
        state = {name: value - rate * grads[name] for name, value in state.items()}
    """
    training = torch.is_grad_enabled() and any(value.requires_grad for value in fast.values())
    leaves = {name: v if training and v.requires_grad else v.detach().requires_grad_() for name, v in fast.items()}
    with torch.enable_grad():
        grads = torch.autograd.grad(
            loss(leaves), list(leaves.values()), create_graph=training and not first_order, allow_unused=True
        )
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(leaves.items(), grads, strict=True)
    }
