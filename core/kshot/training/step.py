"""One outer step: the loss of a batch, backpropagated in parts, and the optimiser's update. Never waits for a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kshot.data.episodes import Episodes
from kshot.learner import FeatureLearner, Learner
from kshot.training.distributed import Ranks
from kshot.training.settings import Training


def learner_step(
    learner: Learner, batch: Episodes, optimiser: torch.optim.Optimizer, settings: Training, ranks: Ranks | None = None
) -> Tensor:
    """Update a learner in training mode, and return the mean loss () of the batch, on its device."""
    total = update(learner, batch, optimiser, settings, ranks or Ranks())
    learner.stepped()
    return total


def update(
    learner: Learner, batch: Episodes, optimiser: torch.optim.Optimizer, settings: Training, ranks: Ranks
) -> Tensor:
    """`learner_step` without `learner.stepped()`: the part that a CUDA graph can replay."""
    own, at_once = ranks.part(batch), episodes_at_once(learner, settings, batch.support.device)
    total = batch.support.new_zeros(())
    optimiser.zero_grad(set_to_none=True)
    with _precision(settings, batch.support.device) as forward:
        for start in range(0, len(own), at_once):
            part = own.part(start, start + at_once)
            with forward:
                loss = learner.meta_loss(part) * (len(part) / len(batch))
            loss.backward()
            total = total + loss.detach()
    total = ranks.add_up(total, learner.parameters())
    if settings.clip is not None:
        torch.nn.utils.clip_grad_norm_(learner.parameters(), settings.clip)
    optimiser.step()
    return total


def episodes_at_once(learner: Learner, settings: Training, device: torch.device) -> int:
    """How many episodes share one backward pass.

    On a CPU, learners that adapt the backbone process episodes one by one: faster, with the graph of one in memory.
    """
    one_by_one = device.type == "cpu" and not isinstance(learner, FeatureLearner) and not learner.coupled
    return settings.episodes_at_once or (1 if one_by_one else settings.episodes_per_step)


def learning_rate(settings: Training, step: int) -> float:
    """The outer learning rate at a step: constant, decayed to zero by a cosine or linearly, or halved periodically."""
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    if settings.schedule == "linear":
        return settings.lr * (1 - step / settings.steps)
    if settings.schedule == "halve":
        return settings.lr * 0.5 ** (step // settings.halve_every)
    return settings.lr


def make_optimiser(learner: Learner, settings: Training, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser of the outer loop; on a GPU a fused one."""
    parameters = [p for p in learner.parameters() if p.requires_grad]
    fused, graph = True if device.type == "cuda" else None, settings.cuda_graph and device.type == "cuda"
    lr = torch.tensor(settings.lr, device=device) if graph else settings.lr
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=settings.weight_decay, fused=fused, capturable=graph)
    return torch.optim.SGD(
        parameters,
        lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
        fused=fused,
    )


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step; a tensor, which a CUDA graph reads, in place."""
    held = optimiser.defaults["lr"]
    for group in optimiser.param_groups:
        group["lr"] = held.fill_(lr) if isinstance(held, Tensor) else lr


@contextmanager
def _precision(settings: Training, device: torch.device) -> Iterator[torch.autocast]:
    """Set the precision inside the block; yields the autocast context for the forward pass."""
    # Autocast's cache of cast weights does not work with nested torch.func transforms.
    bfloat16 = settings.precision == "bfloat16"
    forward = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False)
    parts = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]  # created at import
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "tf32" if settings.precision == "tf32" else "ieee"
    try:
        yield forward
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision
