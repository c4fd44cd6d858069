"""What turns images into features: the interface of a backbone, and how one is built by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from kshot.norms import Norm


class BackboneConfig(BaseModel):
    """A backbone's settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Backbone(nn.Module, ABC):
    """Images (N, C, H, W) in 0..1 to features (N, `features`). It normalises colours itself, if it wants to."""

    Config: ClassVar[type[BackboneConfig]] = BackboneConfig
    features: int
    """The width of the features."""
    grid: tuple[int, int, int] | None = None
    """(channels, height, width) of the map that the features are, flattened; None where they are no map."""

    def __init__(self, image: tuple[int, int, int], norm: Norm, config: Any) -> None:
        """For images of shape (channels, height, width), normalising by `norm`."""
        super().__init__()
        self.image = image

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features (N, features) of images (N, C, H, W)."""
