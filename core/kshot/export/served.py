"""A learner that runs the graphs of a bundle, for comparing them with torch on the same episodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kshot.backbones import Backbone, BackboneConfig
from kshot.learner import Learner, LearnerConfig, State
from kshot.norms import Norm
from kshot_runtime.bundle import Graphs

StepsFor = Callable[[float], int | None]
"""Maps shots to the number of inner steps; None for a learner without inner steps."""


class Served(Learner):
    """A learner that adapts and classifies by ONNX graphs, which take images as uint8."""

    name = "served"

    def __init__(
        self, graphs: Graphs, image: tuple[int, int, int], features: int, norm: Norm, steps_for: StepsFor
    ) -> None:
        super().__init__(_Embedding(graphs, image, features, norm), LearnerConfig())
        self.graphs, self.steps_for = graphs, steps_for

    @property
    def takes_features(self) -> bool:
        return self.graphs.takes_features

    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        steps = self.steps_for(len(labels) / len(classes))
        state = self.graphs.adapt(to_bytes(support), labels.numpy(), classes.numpy(), steps)
        return {name: torch.from_numpy(value) for name, value in state.items()}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return torch.from_numpy(self.graphs.logits({k: v.numpy() for k, v in state.items()}, to_bytes(query)))


class _Embedding(Backbone):
    def __init__(self, graphs: Graphs, image: tuple[int, int, int], features: int, norm: Norm) -> None:
        super().__init__(image, BackboneConfig(norm=norm))
        self.graphs, self.features = graphs, features
        self.register_buffer("digest", torch.tensor(list(graphs.digest), dtype=torch.uint8))  # part of its backbone_key

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.graphs.embed(to_bytes(images)))


def to_bytes(images: Tensor) -> np.ndarray:
    """Images in 0..1 as uint8 (N, C, H, W), inverting `as_floats`; features (N, D) unchanged."""
    if images.dim() == 2:
        return images.numpy()
    pixels: np.ndarray = (images * 255).round().to(torch.uint8).contiguous().numpy()
    return pixels
