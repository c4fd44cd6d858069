"""Outer steps as CUDA graphs: all kernels of a step are launched at once, with no Python between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kshot.data.episodes import Episodes
from kshot.learner import Learner
from kshot_runtime.errors import KshotError

_EAGER = 3  # steps of a kind before one is captured, in which libraries make their choices and gradients their memory


class Graphs:
    """Replays `update(batch)`, an outer step of `learner`, as a CUDA graph for each kind of batch.

    The first steps of a kind run as usual, on the stream that capturing needs. What a step does may depend on the
    batch's shape and on `learner.stage`, and on nothing else outside the GPU's memory.
    """

    def __init__(self, learner: Learner, update: Callable[[Episodes], Tensor]) -> None:
        self._learner, self._update = learner, update
        self._taken: Counter[tuple[object, ...]] = Counter()
        self._graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Episodes, Tensor]] = {}
        self._stream = torch.cuda.Stream()

    def __call__(self, batch: Episodes) -> Tensor:
        """Take the step; the loss () is overwritten by the next step of its kind."""
        kind = self._learner.stage, batch.shape, *(tensor.shape for tensor in _tensors(batch).values())
        self._taken[kind] += 1
        if self._taken[kind] <= _EAGER:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                loss = self._update(batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            return loss
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(batch)
        graph, inputs, loss = self._graphs[kind]
        for name, tensor in _tensors(batch).items():
            getattr(inputs, name).copy_(tensor)
        graph.replay()
        return loss

    def _capture(self, batch: Episodes) -> tuple[torch.cuda.CUDAGraph, Episodes, Tensor]:
        """The graph of a step, which is not taken yet, with the batch that it reads and the loss that it writes."""
        clones: Any = {name: tensor.clone() for name, tensor in _tensors(batch).items()}
        inputs = replace(batch, **clones)
        graph = torch.cuda.CUDAGraph()
        before = self._places()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                loss = self._update(inputs)
        except RuntimeError as error:
            raise self._refusal(f"cannot be captured ({str(error).partition(chr(10))[0]})") from None
        if self._places() != before:
            raise self._refusal("puts new tensors in the place of its buffers, which a graph would not read")
        return graph, inputs, loss

    def _places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self._learner.parameters(), *self._learner.buffers())]

    def _refusal(self, why: str) -> KshotError:
        return KshotError(f"a training step of {self._learner.name!r} {why}. Set training.cuda_graph = false.")


def _tensors(batch: Episodes) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
