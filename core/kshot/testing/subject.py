"""The learner under test, and the toy images and the backbone that tests use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kshot import plugins
from kshot.backbones import Backbone, BackboneConfig
from kshot.data.datasets import ClassImages
from kshot.data.episodes import Episode, Shape, sample_episodes
from kshot.learner import Learner
from kshot.norms import Norm
from kshot.recipe import Recipe

SIDE = 16
"""Height and width of toy images, in pixels."""


@dataclass(frozen=True)
class Subject:
    """The learner under test, by name, on a small conv4 backbone; `options` are settings of the learner's Config."""

    name: str
    folder: Path  # for files that a check writes
    options: dict[str, Any] = field(default_factory=dict)
    norm: Norm | None = None  # of the backbone; if None, the learner's default
    steps: int = 60  # outer steps of the toy training

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(
            name="conformance",
            dataset={"name": "toy"},
            backbone={"name": "conv4", "width": 8, "norm": self.norm},
            learner={"name": self.name, **self.options},
        )

    @property
    def learner(self) -> type[Learner]:
        learner: type[Learner] = plugins.find().learner(self.name).value
        return learner

    @property
    def norms(self) -> Sequence[Norm]:
        """All norms that the learner supports, its default first; only `norm` if that is set."""
        return (self.norm,) if self.norm else self.learner.norms

    def build(self, seed: int = 0) -> Learner:
        """A new learner in eval mode, with noise added to its parameters so that no initial symmetry hides an error."""
        torch.manual_seed(seed)
        learner = self.recipe.build((1, SIDE, SIDE))
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return learner.eval()

    def episode(self, shape: Shape = Shape(5, 2, 3), step: int = 0) -> Episode:  # noqa: B008  (frozen)
        return sample_episodes(toy_images(), shape, 1, seed=7, step=step, stream="test")[0]


class Pixels(Backbone):
    """A backbone whose features are the image's pixels, so that expected results can be computed by hand."""

    def __init__(self, image: tuple[int, int, int], config: BackboneConfig = BackboneConfig()) -> None:  # noqa: B008
        super().__init__(image, config)
        self.features = math.prod(image)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def toy_images(classes: int = 30, images: int = 10, seed: int = 0, stripes: bool = False) -> ClassImages:
    """Classes of random smooth patterns; images (1, SIDE, SIDE) of a class are noisy, shifted copies of its pattern.

    With `stripes`, random stripes are added to each image as a nuisance that training can learn to ignore.
    """
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (classes, 4, 4))
    patterns = np.kron(coarse, np.ones((SIDE // 4, SIDE // 4)))  # (classes, SIDE, SIDE)
    arrays = []
    for pattern in patterns:
        copies = [np.roll(pattern, random.integers(-1, 2, 2), (0, 1)) for _ in range(images)]
        noisy = np.stack(copies) + random.normal(0, 20, (images, SIDE, SIDE))
        if stripes:
            noisy = 0.8 * noisy + 25 + _stripes(images, random)
        arrays.append(noisy.clip(0, 255).astype(np.uint8)[:, None])  # (images, 1, SIDE, SIDE)
    return ClassImages.from_arrays(arrays)


def _stripes(images: int, random: np.random.Generator) -> np.ndarray:
    """Sine waves (images, SIDE, SIDE), three pixels long, with a random angle, phase and amplitude for each image."""
    angle, phase = random.uniform(0, np.pi, (images, 1, 1)), random.uniform(0, 2 * np.pi, (images, 1, 1))
    y, x = np.mgrid[:SIDE, :SIDE]
    waves: np.ndarray = random.uniform(20, 60, (images, 1, 1)) * np.sin(
        2.2 * (x * np.cos(angle) + y * np.sin(angle)) + phase
    )
    return waves
