"""Tensor functions for learners. All of them export to ONNX and run under `torch.func.vmap`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def one_hot(labels: Tensor, classes: Tensor) -> Tensor:
    """(N, W) float: 1 where label n (N,) equals class w (W,), else 0. Labels need not be 0..W-1."""
    return (labels[:, None] == classes[None, :]).float()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N, W) to one-hot targets (N, W): a scalar."""
    return -(targets.to(logits.dtype) * logits.log_softmax(1)).sum(1).mean()


def class_means(features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Mean feature of each class: (W, D) from features (S, D). Shots may differ between classes."""
    members = one_hot(labels, classes).to(features.dtype)  # (S, W)
    return members.t() @ features / members.sum(0).clamp_min(1)[:, None]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances (A, B) between rows of a (A, D) and b (B, D); ONNX has no cdist."""
    return ((a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * a @ b.t()).clamp_min(0)


def channels_last(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in channels-last memory layout, for fast convolutions.

    With one channel both layouts are the same bytes, so the strides are set explicitly.
    """
    count, channels, height, width = images.shape
    if channels == 1:
        return images.contiguous().reshape(count, height, width, 1).permute(0, 3, 1, 2)
    return images.movedim(1, -1).contiguous().movedim(-1, 1)


def unit(rows: Tensor) -> Tensor:
    """Rows (N, D) scaled to length 1; a row of zeros stays zero."""
    return F.normalize(rows, dim=1)


def solve(matrix: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """x (N, M) with A x = b for a symmetric positive definite A (N, N), given as the function x -> A x.

    Conjugate gradients on all columns of b (N, M) at once: exact after as many steps as A has distinct eigenvalues.
    ONNX has no solve.
    """
    x, residual = b * 0, b
    direction, square = residual, (residual * residual).sum(0)  # (N, M), (M,)
    tiny = 1e-12 * square.clamp_min(1e-30)  # a converged column no longer changes
    for _ in range(steps):
        product = matrix(direction)
        length = square / (direction * product).sum(0).clamp_min(1e-30)
        length = length * (square > tiny).to(length.dtype)
        x, residual = x + length * direction, residual - length * product
        before, square = square, (residual * residual).sum(0)
        direction = residual + square / before.clamp_min(1e-30) * direction
    return x
