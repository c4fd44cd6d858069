"""Augmentation of training images: random shifts, rotations, scales, flips and changes of brightness."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from kshot.data.episodes import Episodes
from kshot.data.placed import sent

_STREAM = 100  # of random numbers: different from the streams of episodes


class Augmentation(BaseModel):
    """The maximum of each change; for each image it is drawn uniformly up to that."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shift: float = Field(0.0, ge=0, lt=1, description="move by up to this fraction of the side")
    rotate: float = Field(0.0, ge=0, le=180, description="rotate by up to this number of degrees")
    scale: float = Field(0.0, ge=0, lt=1, description="enlarge or shrink by up to this factor: 0.1 for 0.9 to 1.1")
    flip: bool = Field(False, description="mirror half of the images left to right; not for characters")
    light: float = Field(0.0, ge=0, lt=1, description="change brightness and contrast by up to this factor")

    @property
    def moves(self) -> bool:
        return self.flip or max(self.shift, self.rotate, self.scale) > 0


def augment(episodes: Episodes, settings: Augmentation, *, seed: int, step: int) -> Episodes:
    """The episodes with every image changed at random, on its device.

    The random numbers are drawn on the CPU and depend on (seed, step) only.
    """
    if settings == Augmentation():
        return episodes
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _STREAM, step])))

    def changed(images: Tensor) -> Tensor:
        flat = _change(images.flatten(0, 1), settings, random)
        return flat.unflatten(0, images.shape[:2])

    support, query = changed(episodes.support), changed(episodes.query)
    unlabelled = None if episodes.unlabelled is None else _change(episodes.unlabelled, settings, random)
    return replace(episodes, support=support, query=query, unlabelled=unlabelled)


def _change(images: Tensor, settings: Augmentation, random: np.random.Generator) -> Tensor:
    """Images (N, C, H, W) in 0..1, each with its own random transform; outside the image, edge pixels repeat."""

    def drawn(most: float) -> Tensor:
        numbers = torch.from_numpy(random.uniform(-most, most, len(images))).to(images.dtype)  # (N,)
        return sent(numbers, images.device)

    if settings.moves:
        angle, scale = drawn(math.radians(settings.rotate)), 1 + drawn(settings.scale)
        across, down = drawn(2 * settings.shift), drawn(2 * settings.shift)  # the image spans -1..1
        mirror = torch.where(drawn(1.0) < 0, -1.0, 1.0) if settings.flip else torch.ones_like(angle)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        affine = torch.stack([cos * mirror, -sin, across, sin * mirror, cos, down], 1).view(-1, 2, 3)
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)  # (N, H, W, 2)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if settings.light > 0:
        gain, shift = 1 + drawn(settings.light), drawn(settings.light)
        grey = images.mean((1, 2, 3))
        images = gain[:, None, None, None] * images + ((1 - gain) * grey + shift * grey)[:, None, None, None]
        images = images.clamp(0, 1)
    return images.contiguous(memory_format=torch.channels_last)
