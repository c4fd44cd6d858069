"""Normalisation as a decision: where the statistics come from decides what a query's answer may depend on.

running        averages kept while meta-training; a query depends on nothing else
support        the support set's statistics, kept in the state; a query depends on the support set only
batch          while meta-training each batch's own, queries included; `support` when served
group          each image's own (GroupNorm)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor, nn

Norm = Literal["running", "support", "batch", "group"]

BY_ITSELF: tuple[Norm, ...] = ("running", "group")
"""Norms under which the features of an image depend on no other image."""

_recorder: ContextVar[dict[nn.Module, tuple[Tensor, Tensor]] | None] = ContextVar("recorder", default=None)


class SupportNorm(nn.Module):
    """Batch normalisation that keeps no averages: by the statistics it is given, else by those of its input.

    The buffers `mean` and `var` are empty, which means "use the input's own"; a call that fills them (see
    `Learner.embed`) normalises with those. In plain ops, so that its second derivative is right under any transform.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.empty(0), persistent=False)
        self.register_buffer("var", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, channels, height, width)."""
        if self.mean.numel():
            mean, var = self.mean, self.var
            centred = x - mean[:, None, None]
        else:
            mean = x.mean((0, 2, 3))
            centred = x - mean[:, None, None]
            var = (centred * centred).mean((0, 2, 3))
            if (seen := _recorder.get()) is not None:
                seen[self] = mean, var
        scale = self.weight * (var + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """The normalisation layer for feature maps of so many channels."""
    if norm == "running":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        # Groups of about eight channels: a single channel of a 1x1 map would be normalised to nothing.
        groups = next(count for count in range(max(1, channels // 8), 0, -1) if channels % count == 0)
        return nn.GroupNorm(groups, channels)
    return SupportNorm(channels)


@contextmanager
def recorded(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the statistics that `module`'s SupportNorms use inside the block, under their buffers' names."""
    statistics: dict[str, Tensor] = {}
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    token = _recorder.set(seen)
    try:
        yield statistics
    finally:
        _recorder.reset(token)
        for name, layer in module.named_modules():
            if layer in seen:
                statistics[f"{name}.mean"], statistics[f"{name}.var"] = seen[layer]
