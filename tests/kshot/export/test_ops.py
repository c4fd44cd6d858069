"""The decompositions give the gradients of autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kshot.export.ops import backward_ops

aten = torch.ops.aten


@pytest.mark.parametrize("size", [(1, 1), (2, 3)], ids=["1x1", "2x3"])
@pytest.mark.parametrize("channels", [1, 12])
@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2, "padding": (1, 0)}, {"dilation": (1, 2)}, {"groups": "all"}],
    ids=["plain", "stride", "dilation", "groups"],
)
def test_a_convolution_s_gradients(size: tuple[int, int], channels: int, settings: dict[str, object]) -> None:
    settings = {**settings, "groups": channels if settings.get("groups") else 1}
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 2 * channels, size, **settings).double()
    x = torch.randn(3, channels, 7, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, layer.weight, layer.bias], grad)
    found = backward_ops()[aten.convolution_backward.default](
        grad, x.detach(), layer.weight.detach(), [2 * channels], layer.stride, layer.padding, layer.dilation, False,
        [0, 0], layer.groups, [True, True, True],
    )  # fmt: skip
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernel", [(2, 2), (3, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("height", [6, 7])
def test_of_equal_pixels_in_a_window_the_first_gets_the_gradient(kernel: tuple[int, int], height: int) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 3, (4, 2, height, 7)).float().requires_grad_()  # windows with ties, and pixels in no window
    y, indices = nn.functional.max_pool2d_with_indices(x, kernel)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    backward = backward_ops()[aten.max_pool2d_with_indices_backward.default]
    found = backward(grad, x.detach(), kernel, [], [0, 0], [1, 1], False, indices)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
