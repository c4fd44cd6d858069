"""A bidirectional LSTM over any number of items: torch's in training, and the ONNX operator in exported graphs.

A Python loop over a free number of items cannot be traced. This is one operation to the tracer, and
`kshot.export.ops` says how ONNX spells it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def bidirectional_lstm(lstm: nn.LSTM, items: Tensor) -> Tensor:
    """The outputs of a bidirectional LSTM of one layer for items (S, D): (S, 2, hidden), a row for each direction."""
    # The operation has no gradient, so it is for when none is wanted: evaluation, and the exporter's tracing.
    read = lstm(items)[0] if torch.is_grad_enabled() else _bidirectional_lstm(items, list(lstm.parameters()))
    return read.unflatten(1, (2, lstm.hidden_size))


@torch.library.custom_op("kshot::bidirectional_lstm", mutates_args=())
def _bidirectional_lstm(items: Tensor, weights: list[Tensor]) -> Tensor:
    """(S, 2 * hidden) of items (S, D); the weights are those of a bidirectional nn.LSTM, in its order."""
    start = items.new_zeros(2, 1, weights[1].shape[1])
    read: Tensor = torch.lstm(items[:, None], (start, start), weights, True, 1, 0.0, False, True, False)[0]
    return read.squeeze(1)


@_bidirectional_lstm.register_fake
def _(items: Tensor, weights: list[Tensor]) -> Tensor:
    return items.new_empty(items.shape[0], 2 * weights[1].shape[1])
