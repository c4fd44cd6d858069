"""A bidirectional LSTM over any number of items: `nn.LSTM` in training, and ONNX's LSTM in exported graphs.

A Python loop over a dynamic number of items cannot be traced. A custom operation can, and `kshot.export.ops` translates
it to ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def bidirectional_lstm(lstm: nn.LSTM, items: Tensor) -> Tensor:
    """Outputs (S, 2, hidden) of a bidirectional one-layer LSTM for items (S, D), one row for each direction."""
    # The custom operation has no gradient, so it is used only in evaluation and export.
    outputs = lstm(items)[0] if torch.is_grad_enabled() else _bidirectional_lstm(items, list(lstm.parameters()))
    return outputs.unflatten(1, (2, lstm.hidden_size))


@torch.library.custom_op("kshot::bidirectional_lstm", mutates_args=())
def _bidirectional_lstm(items: Tensor, weights: list[Tensor]) -> Tensor:
    """Outputs (S, 2 * hidden) for items (S, D); weights as a bidirectional nn.LSTM orders them."""
    start = items.new_zeros(2, 1, weights[1].shape[1])
    outputs: Tensor = torch.lstm(items[:, None], (start, start), weights, True, 1, 0.0, False, True, False)[0]
    return outputs.squeeze(1)


@_bidirectional_lstm.register_fake
def _(items: Tensor, weights: list[Tensor]) -> Tensor:
    return items.new_empty(items.shape[0], 2 * weights[1].shape[1])
