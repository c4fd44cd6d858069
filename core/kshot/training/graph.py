"""Outer steps as CUDA graphs, which launch all kernels of a step at once."""

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

_EAGER = 3  # steps before capturing, in which libraries select kernels and gradients are allocated


class Graphs:
    """Replays `update(batch)`, an outer step of `learner`, as a CUDA graph for each batch shape and `learner.stage`.

    The first steps of each kind run normally, on the stream that capturing needs. A step may depend on nothing else
    outside the memory of the GPU.
    """

    def __init__(self, learner: Learner, update: Callable[[Episodes], Tensor]) -> None:
        self._learner, self._update = learner, update
        self._taken: Counter[tuple[object, ...]] = Counter()
        self._graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Episodes, Tensor]] = {}
        self._stream = torch.cuda.Stream()

    def __call__(self, batch: Episodes) -> Tensor:
        """Take a step and return its loss (), which the next step of the same kind overwrites."""
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
        """Capture a step without running it: the graph, the batch that it reads, and the loss that it writes."""
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
            raise self._refusal("replaces buffers by new tensors, which a graph would not read")
        return graph, inputs, loss

    def _places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self._learner.parameters(), *self._learner.buffers())]

    def _refusal(self, why: str) -> KshotError:
        return KshotError(f"a training step of {self._learner.name!r} {why}. Set training.cuda_graph = false.")


def _tensors(batch: Episodes) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
