"""Decompositions of backward ops, such as those of convolutions and poolings, into ops that ONNX has.

The exporter translates forward ops itself. If a backward op is missing here, the export fails and names that op.
"""

# No `from __future__ import annotations`: the exporter reads the type annotations of the functions in TRANSLATIONS.
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import torch
from onnxscript import FLOAT, INT64
from onnxscript import opset20 as op
from torch import Tensor
from torch._decomp import decomposition_table, get_decompositions

import kshot.recurrence  # noqa: F401  (registers the operation that is translated below)

aten = torch.ops.aten

_JOINED_CHANNELS = 8  # largest number for which _weight_gradient computes one product over all kernel positions


@cache
def backward_ops() -> dict[Any, Callable[..., Any]]:
    """The table for `make_fx`: torch's decompositions of backward ops, and ours where torch's cannot be exported."""
    table = {o: f for o, f in decomposition_table.items() if "backward" in str(o)}
    table |= get_decompositions([aten.nll_loss_forward, aten.native_group_norm])
    table |= {
        aten.convolution_backward.default: _convolution_backward,
        aten.max_pool2d_with_indices_backward.default: _max_pool2d_backward,
        aten.avg_pool2d_backward.default: _avg_pool2d_backward,
        aten.threshold_backward.default: lambda grad, x, threshold: grad * (x > threshold).to(grad.dtype),
    }
    return table


def _convolution_backward(
    grad: Tensor,  # (N, out, h, w)
    x: Tensor,  # (N, in, H, W)
    weight: Tensor,  # (out, in / groups, kh, kw); (in, out / groups, kh, kw) if transposed
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if weight.dim() != 4:
        raise NotImplementedError(f"only 2D convolutions have an exportable gradient, not {weight.dim() - 2}D ones")
    kernel = weight.shape[2:]
    to_x = to_weight = to_bias = None
    if wanted[0] and transposed:
        to_x = aten.convolution(grad, weight, None, stride, padding, dilation, False, [0, 0], groups)
    elif wanted[0] and groups == 1 and list(stride) == [1, 1] and padding[0] < kernel[0] and padding[1] < kernel[1]:
        # As a plain convolution, which onnxruntime optimises if the weights are constants.
        around = [dilation[d] * (kernel[d] - 1) - padding[d] for d in range(2)]
        flipped = weight.transpose(0, 1).flip(2, 3)
        to_x = aten.convolution(grad, flipped, None, stride, around, dilation, False, [0, 0], groups)
    elif wanted[0]:
        missing = [
            x.shape[2 + d] - ((grad.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (kernel[d] - 1) + 1)
            for d in range(2)
        ]
        to_x = aten.convolution(grad, weight, None, stride, padding, dilation, True, missing, groups)
    if wanted[1]:
        outer, inner = (x, grad) if transposed else (grad, x)
        to_weight = _weight_gradient(outer, inner, kernel, stride, padding, dilation, groups)
    if wanted[2]:
        to_bias = grad.sum((0, 2, 3))
    return to_x, to_weight, to_bias


def _weight_gradient(
    grad: Tensor,  # (N, out, h, w)
    x: Tensor,  # (N, in, H, W)
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of the kernel: for each kernel position, the product of the gradients and its input pixels.

    With few channels one product covers all positions, so that the gradients are read once.
    """
    (out, height, width), inner = grad.shape[1:], x.shape[1]
    x = x.permute(0, 2, 3, 1)  # (N, H, W, in): with channels last, slices reshape to matrices without a copy
    if any(padding):
        x = aten.constant_pad_nd(x, [0, 0, padding[1], padding[1], padding[0], padding[0]])
    rows = grad.permute(1, 0, 2, 3).reshape(out, -1)  # (out, N * h * w)
    pixels = [
        x[
            :,
            i * dilation[0] : i * dilation[0] + (height - 1) * stride[0] + 1 : stride[0],
            j * dilation[1] : j * dilation[1] + (width - 1) * stride[1] + 1 : stride[1],
        ].reshape(-1, *((groups, inner // groups) if groups > 1 else (inner,)))  # (N * h * w, in)
        for i, j in product(range(kernel[0]), range(kernel[1]))
    ]
    if inner // groups <= _JOINED_CHANNELS:
        pixels = [torch.cat(pixels, -1)]
    if groups > 1:
        rows = rows.unflatten(0, (groups, -1))
        products = [torch.bmm(rows, columns.transpose(0, 1)).flatten(0, 1) for columns in pixels]
    else:
        products = [rows @ columns for columns in pixels]
    return torch.cat(products, 1).reshape(out, *kernel, -1).permute(0, 3, 1, 2)


def _max_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Add each gradient (N, C, h, w) to the first pixel with the maximum of its window."""
    kernel, stride, dilation = _pair(kernel), _pair(stride or kernel), _pair(dilation)
    if kernel == stride and dilation == [1, 1] and not any(padding) and not ceil_mode:
        return _unpooled(grad, x, aten.max_pool2d_with_indices(x, kernel, stride)[0], kernel)
    planes, height, width = x.shape[0] * x.shape[1], x.shape[2], x.shape[3]
    winners, grads = indices.reshape(planes, -1), grad.reshape(planes, -1)
    zeros = torch.zeros_like(x).reshape(planes, height * width)
    apart = all(s >= d * (k - 1) + 1 for k, s, d in zip(kernel, stride, dilation, strict=True))
    spread = zeros.scatter(1, winners, grads) if apart else zeros.scatter_add(1, winners, grads)
    return spread.reshape(x.shape)


def _unpooled(grad: Tensor, x: Tensor, pooled: Tensor, kernel: Sequence[int]) -> Tensor:
    """The gradient of x (N, C, H, W) if windows do not overlap: by slices, since MaxPool with indices is slow.

    Computed with channels last, so that slices copy whole pixels.
    """
    (height, width), (down, across) = x.shape[2:], kernel
    whole = [grad.shape[2] * down, grad.shape[3] * across]  # size of the area that windows cover
    grad, x, pooled = (maps.permute(0, 2, 3, 1) for maps in (grad, x, pooled))
    rows = []
    for i in range(down):
        row = []
        for j in range(across):
            won = x[:, i : whole[0] : down, j : whole[1] : across] == pooled  # (N, h, w, C)
            row.append(grad * won.to(grad.dtype))  # three times as fast as Where
            grad = grad - row[-1]
        rows.append(torch.stack(row, 3).flatten(2, 3))  # (N, h, W, C)
    spread = torch.stack(rows, 2).flatten(1, 2)  # (N, H, W, C)
    if (missing := [height - whole[0], width - whole[1]]) != [0, 0]:
        spread = aten.constant_pad_nd(spread, [0, 0, 0, missing[1], 0, missing[0]])
    return spread.permute(0, 3, 1, 2)


def _avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Distribute each gradient evenly over its window, by a transposed convolution with a constant kernel."""
    kernel, padding = _pair(kernel), _pair(padding)
    if ceil_mode or (any(padding) and not count_include_pad):
        raise NotImplementedError("avg_pool2d has no exportable gradient with ceil_mode or count_include_pad=False")
    channels, area = x.shape[1], divisor_override or kernel[0] * kernel[1]
    share = torch.full((channels, 1, *kernel), 1 / area, dtype=grad.dtype, device=grad.device)
    stride = _pair(stride) if stride else kernel
    missing = [x.shape[2 + d] - ((grad.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + kernel[d]) for d in range(2)]
    spread: Tensor = aten.convolution(grad, share, None, stride, padding, [1, 1], True, missing, channels)
    return spread


def _pair(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _max_pool2d_with_indices(
    x: FLOAT,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[FLOAT, INT64]:
    """MaxPool. ONNX counts indices over the whole batch, torch within each plane (H, W)."""
    padding = _pair(padding)
    values, winners = op.MaxPool(
        x,
        kernel_shape=_pair(kernel_size),
        strides=_pair(stride or kernel_size),
        pads=padding * 2,
        dilations=_pair(dilation),
        ceil_mode=int(ceil_mode),
    )
    plane = int(x.shape[2]) * int(x.shape[3])  # constant: images have a fixed size
    return values, op.Mod(winners, op.Constant(value_int=plane))


def _bidirectional_lstm(items: FLOAT, weights: Sequence[FLOAT]) -> FLOAT:
    """LSTM. In ONNX there are axes for the two directions and the batch (of 1)."""
    hidden = int(weights[1].shape[1])
    # torch orders the gates i, f, g, o; ONNX i, o, f, g
    rows = [*range(hidden), *range(3 * hidden, 4 * hidden), *range(hidden, 3 * hidden)]
    first, second = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])

    def both(forward: FLOAT, backward: FLOAT) -> FLOAT:
        directions = op.Concat(op.Unsqueeze(forward, first), op.Unsqueeze(backward, first), axis=0)
        return op.Gather(directions, op.Constant(value_ints=rows), axis=1)

    x, h, x_bias, h_bias = (both(forward, backward) for forward, backward in zip(weights[:4], weights[4:], strict=True))
    bias = op.Concat(x_bias, h_bias, axis=1)
    outputs, _, _ = op.LSTM(op.Unsqueeze(items, second), x, h, bias, direction="bidirectional", hidden_size=hidden)
    return op.Reshape(outputs, op.Constant(value_ints=[0, -1]))  # from (S, 2, 1, hidden)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.max_pool2d_with_indices.default: _max_pool2d_with_indices,
    torch.ops.kshot.bidirectional_lstm.default: _bidirectional_lstm,
}
"""Translations of forward ops that the exporter lacks, or translates wrongly or inefficiently."""
