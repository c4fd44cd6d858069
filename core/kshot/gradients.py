"""The inner loop's gradient: one helper to meta-train through, to evaluate without a graph, and to trace to ONNX.

In a loop over episodes it is `torch.autograd.grad`, a tenth to a third faster on a CPU than `torch.func.grad`
(measured on MAML's outer step, second and first order); under `torch.func.vmap`, on a GPU, it is `torch.func.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad_and_value


def gradient(
    loss: Callable[[dict[str, Tensor]], Tensor], fast: Mapping[str, Tensor], *, first_order: bool = False
) -> dict[str, Tensor]:
    """The gradient of a scalar `loss(fast)` with respect to each tensor of `fast`, under the same names.

    While meta-training (gradients enabled, and `fast` descends from parameters) the result can be differentiated
    again, which makes the outer gradient second order; `first_order` drops that. Elsewhere no graph outlives the
    call. The derivative is partial: an entry that others were computed from counts by itself. A tensor that the loss
    does not touch gets zeros.

        grads = gradient(lambda fast: cross_entropy(logits(fast, support), targets), state)
        state = {name: value - rate * grads[name] for name, value in state.items()}
    """
    return value_and_gradient(loss, fast, first_order=first_order)[1]


def value_and_gradient(
    loss: Callable[[dict[str, Tensor]], Tensor], fast: Mapping[str, Tensor], *, first_order: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss(fast)` and its `gradient`: the two can be differentiated again, or neither."""
    if torch._C._are_functorch_transforms_active():  # under vmap, say, where autograd.grad does not work
        with torch.set_grad_enabled(torch.is_grad_enabled() and not first_order):
            found, value = grad_and_value(loss)(dict(fast))
        return value, found
    keep = torch.is_grad_enabled() and not first_order and any(value.requires_grad for value in fast.values())
    # Leaves of its own: the derivative is partial, though an entry of `fast` was computed from another one.
    leaves = {
        name: v.view_as(v) if keep and v.requires_grad else v.detach().requires_grad_() for name, v in fast.items()
    }
    with torch.enable_grad():
        value = loss(leaves)
        grads = torch.autograd.grad(value, list(leaves.values()), create_graph=keep, allow_unused=True)
    return value if keep else value.detach(), {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
