"""Normalisation layers. The norm decides which statistics are used, and so what the features of a query depend on:

running        running averages from training (BatchNorm): on no other image
support        the statistics of the support set, which the state holds: on the support set
batch          in training, the statistics of each batch, queries included; in evaluation as `support`
group          the statistics of each image (GroupNorm): on no other image

`convolve` fuses a convolution, its norm and a max-pooling.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["running", "support", "batch", "group"]

BY_ITSELF: tuple[Norm, ...] = ("running", "group")
"""Norms under which the features of an image depend on no other image."""

Statistics = tuple[Tensor, Tensor]
"""Mean and variance (C,) of every channel."""

_recorded: ContextVar[dict[nn.Module, Statistics] | None] = ContextVar("recorded", default=None)


class BatchStatisticsNorm(nn.Module):
    """Batch normalisation by given statistics, or else by those of its input.

    Written in elementary operations, since `F.batch_norm` gives wrong second-order gradients, without an error, under
    two levels of `torch.func.grad` with `vmap` in between.
    """

    weight: Tensor
    bias: Tensor
    eps: float

    @abstractmethod
    def given(self) -> Statistics | None:
        """The statistics to normalise by; None for those of the input."""

    @abstractmethod
    def record(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Called with the statistics of the input, over `count` values of each channel."""

    def scale_and_shift(self, mean: Tensor, var: Tensor, sign: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) that normalise an input with these statistics, which was multiplied by any `sign`."""
        scale = (self.weight if sign is None else self.weight * sign) * (var + self.eps).rsqrt()
        return scale, self.bias - mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, H, W)."""
        if (statistics := self.given()) is None:
            statistics = moments(x)
            self.record(*statistics, x[:, 0].numel())
        return _affine(x, *self.scale_and_shift(*statistics))


class SupportNorm(BatchStatisticsNorm):
    """Batch normalisation without running averages, by the statistics of the input or of a support set.

    The buffers `mean` and `var` are empty, which means those of the input; `Learner.embed` overrides them with the
    support statistics of a state.
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

    def given(self) -> Statistics | None:
        return (self.mean, self.var) if self.mean.numel() else None

    def record(self, mean: Tensor, var: Tensor, count: int) -> None:
        if (seen := _recorded.get()) is not None:
            seen[self] = mean, var


class RunningNorm(BatchStatisticsNorm, nn.BatchNorm2d):  # type: ignore[misc]  # there weight may be None
    """Batch normalisation by running averages; while training, by the input's own statistics."""

    running_mean: Tensor
    running_var: Tensor

    def given(self) -> Statistics | None:
        return None if self.training else (self.running_mean, self.running_var)

    @torch.no_grad()
    def record(self, mean: Tensor, var: Tensor, count: int) -> None:
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / max(count - 1, 1)), self.momentum)  # unbiased, as torch's


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """The normalisation layer for feature maps of `channels` channels."""
    if norm == "running":
        return RunningNorm(channels)
    if norm == "group":
        # Groups of about eight channels: a single channel of a 1x1 map would be normalised to nothing.
        groups = next(count for count in range(max(1, channels // 8), 0, -1) if channels % count == 0)
        return nn.GroupNorm(groups, channels)
    return SupportNorm(channels)


def convolve(maps: Tensor, convolution: nn.Module, norm: nn.Module, pool: int = 1) -> Tensor:
    """`norm(convolution(maps))` of maps (N, C, H, W), max-pooled over windows of `pool` by `pool`.

    Given statistics are folded into the convolution's weights. Otherwise scale and shift are applied after pooling,
    which commutes if no scale is negative; the signs of the scales are therefore folded into the convolution's weights.
    For a convolution from few channels to many, the statistics are computed from its input.
    """
    assert isinstance(convolution, nn.Conv2d)
    if not isinstance(norm, BatchStatisticsNorm):
        return _pooled(norm(convolution(maps)), pool)
    if (statistics := norm.given()) is not None:
        scale, shift = norm.scale_and_shift(*statistics)
        return _pooled(_scaled(maps, convolution, scale, shift), pool)
    sign = torch.where(norm.weight < 0, -1.0, 1.0).to(norm.weight.dtype)  # (C,)
    signed = _scaled(maps, convolution, sign)
    if _widens(maps, convolution):
        mean, var = _moments_of_windows(maps, convolution, sign)
    else:
        mean, var = moments(signed)
    norm.record(mean * sign, var, signed[:, 0].numel())
    scale, shift = norm.scale_and_shift(mean, var, sign)
    return _affine(_pooled(signed, pool), scale, shift)


def _widens(maps: Tensor, convolution: nn.Conv2d) -> bool:
    """Whether a convolution has at least twice as many output channels as values in a window, as first layers have."""
    exact = maps.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return exact and convolution.groups == 1 and 2 * convolution.weight[0].numel() <= convolution.out_channels


def _moments_of_windows(maps: Tensor, convolution: nn.Conv2d, sign: Tensor) -> Statistics:
    """`moments` of sign * convolution(maps), computed from the mean and covariance of its windows of K values."""
    kernel = convolution.weight.flatten(1)  # (C, K)
    eye = torch.eye(kernel.shape[1], dtype=kernel.dtype, device=kernel.device).view(-1, *convolution.weight.shape[1:])
    windows = convolution._conv_forward(maps, eye, None).flatten(2)  # (N, K, positions)
    centre = windows.mean((0, 2))
    centred = windows - centre[:, None]
    covariance = (centred @ centred.mT).mean(0) / windows.shape[2]  # (K, K)
    mean = kernel @ centre if convolution.bias is None else kernel @ centre + convolution.bias
    return mean * sign, (kernel @ covariance * kernel).sum(1)


def _scaled(maps: Tensor, convolution: nn.Conv2d, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """convolution(maps) * scale + shift."""
    bias = shift
    if convolution.bias is not None:
        bias = convolution.bias * scale if shift is None else shift + convolution.bias * scale
    return convolution._conv_forward(maps, convolution.weight * scale.view(-1, 1, 1, 1), bias)


def _affine(maps: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """maps * scale + shift."""
    return torch.addcmul(shift, maps.movedim(1, -1), scale).movedim(-1, 1)


def _pooled(maps: Tensor, size: int) -> Tensor:
    return F.max_pool2d(maps, size) if size > 1 else maps


def moments(maps: Tensor) -> Statistics:
    """Mean and variance (C,) of each channel of maps (N, C, H, W), in float32 or float64."""
    mean, var = _Moments.apply(maps.movedim(1, -1).to(torch.promote_types(maps.dtype, torch.float32)))
    return mean, var


class _Moments(torch.autograd.Function):
    """Mean and variance (C,) of x (N, H, W, C), with a fused backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Statistics:
        mean = x.mean((0, 1, 2))
        centred = x - mean
        in_place = type(x) is Tensor  # and no fake one, which is exported: in-place operations make that slow
        squares = centred.mul_(centred) if in_place else centred * centred
        return mean, squares.mean((0, 1, 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Statistics) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, to_mean: Tensor, to_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x[..., 0].numel()
        slope = to_var * (2 / count)
        return torch.addcmul(to_mean / count - mean * slope, x, slope)


@contextmanager
def recorded(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the statistics of the inputs of `module`'s SupportNorms inside the block, by buffer name."""
    statistics: dict[str, Tensor] = {}
    seen: dict[nn.Module, Statistics] = {}
    token = _recorded.set(seen)
    try:
        yield statistics
    finally:
        _recorded.reset(token)
        if seen:
            for name, layer in module.named_modules():
                if layer in seen:
                    statistics[f"{name}.mean"], statistics[f"{name}.var"] = seen[layer]
