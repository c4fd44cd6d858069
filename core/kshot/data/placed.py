"""Images in GPU memory, as uint8, so that a training step transfers indices only."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import Tensor

from kshot.data.datasets import ClassImages


def placed(images: ClassImages, device: str) -> ClassImages:
    """The same classes with their images on a GPU, if they fit into half of its free memory; else unchanged."""
    if not device.startswith("cuda"):
        return images
    free, _ = torch.cuda.mem_get_info(device)
    return PlacedImages(images, device) if images.counts.sum() * np.prod(images.shape) <= free / 2 else images


class PlacedImages(ClassImages):
    """Classes with all their images (rotated if the class is) on a device: `gather` returns tensors there."""

    def __init__(self, images: ClassImages, device: str) -> None:
        vars(self).update(vars(images))
        self.images, self.device = images, torch.device(device)
        self._first = np.cumsum(images.counts) - images.counts  # (classes,) the row of each class's first image
        self._rows = torch.empty(int(images.counts.sum()), *images.shape, dtype=torch.uint8, device=self.device)
        for number, (first, count) in enumerate(zip(self._first, images.counts, strict=True)):
            self._rows[first : first + count] = torch.from_numpy(images.gather(np.array(number), np.arange(count)))

    def gather(self, classes: np.ndarray, samples: np.ndarray, *, support: bool = False) -> Tensor:  # type: ignore[override]  # on the device
        """Images by class numbers and image numbers within them, broadcast together: uint8 (*batch, C, H, W)."""
        rows = torch.from_numpy(self._first[classes] + samples)  # (*batch,)
        chosen = self._rows.index_select(0, sent(rows.flatten(), self.device))
        return chosen.unflatten(0, rows.shape)

    def _view(self) -> Self:
        return self.images._view()  # type: ignore[return-value]  # a selection uses images in CPU memory


def sent(values: Tensor, device: torch.device) -> Tensor:
    """CPU values on a device, copied without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
