"""Backbones, which map images to features: the interface, pretrained networks, resizing and pooling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from kshot.norms import Norm
from kshot_runtime.errors import KshotError


class BackboneConfig(BaseModel):
    """A backbone's settings: frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    norm: Norm | None = Field(
        None, description="where normalisation takes its statistics from; the learner's first choice if unset"
    )
    start: str | None = Field(
        None,
        description="weights to start from: a state dict's file, a learner.pt, its folder, or models:/NAME/VERSION",
    )


class Backbone(nn.Module, ABC):
    """Maps images (N, C, H, W) in 0..1 to features (N, `features`). Any normalisation of colours is part of it."""

    Config: ClassVar[type[BackboneConfig]] = BackboneConfig
    norms: ClassVar[tuple[Norm, ...]] = ("running", "support", "batch", "group")
    """The supported norms; the first is the default."""
    features: int
    """The width of the features."""
    grid: tuple[int, int, int] | None = None
    """(channels, height, width) if the features are a flattened feature map, else None."""
    mirrors: bool = False
    """Whether features of a support image are averaged with those of its mirror image."""

    def __init__(self, image: tuple[int, int, int], config: Any) -> None:
        """For images of shape (channels, height, width)."""
        super().__init__()
        self.image = image
        self.config = config
        self.norm: Norm = config.norm or self.norms[0]

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features (N, features) of images (N, C, H, W)."""

    @property
    def frozen(self) -> bool:
        """Whether training does not change the features of an image."""
        return self.norm == "running" and not any(parameter.requires_grad for parameter in self.parameters())


class PretrainedBackbone(Backbone):
    """A pretrained network whose features are the pooled outputs of its stages.

    `features = "last"` takes the first part of the last stage. `"stages"` concatenates the parts of all stages (means
    and standard deviations), each normalised to unit length, and `"inner"` those of all but the last: inner stages show
    fine differences such as texture or print. Stages that are not needed are neither computed nor exported.
    """

    norms = ("running",)

    class Config(BackboneConfig):
        features: Literal["last", "stages", "inner", "auto"] = Field(
            "last",
            description="pooled outputs of the last stage, of all stages, of all but the last, or chosen on validation",
        )
        frozen: bool = Field(False, description="do not change the weights while meta-training")
        mirror: bool = Field(
            False,
            description="average a support photo's features with its mirror image's, in twice the time",
        )

    widths: Sequence[Sequence[int]]
    """The widths of the parts of each stage, in order, such as ((32, 32), (64, 64), (1280, 1280))."""

    def __init__(self, image: tuple[int, int, int], config: Config) -> None:
        super().__init__(image, config)
        self.selected, self.mirrors = config.features, config.mirror

    @abstractmethod
    def pooled(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """The pooled parts (N, width) of these stages (in ascending order), for images (N, C, H, W)."""

    @property
    def stages(self) -> Sequence[int]:
        """The numbers of the stages whose outputs are the features."""
        every = range(len(self.widths))
        return {"last": every[-1:], "stages": every, "inner": every[:-1]}[self.selected]

    @property
    def features(self) -> int:  # type: ignore[override]  # computed from the stages
        chosen = [width for stage in self.stages for width in self.widths[stage]]
        return chosen[0] if self.selected == "last" else sum(chosen)

    def measure(self, stages: int) -> list[Sequence[int]]:
        """The `widths` of `stages` stages, measured on a black image; a KshotError if the network rejects it."""
        try:
            with torch.no_grad():
                *inner, last = [part.shape[1] for part in self.pooled(torch.zeros(1, *self.image), range(stages))]
        except Exception as error:  # a third-party network may raise anything
            raise KshotError(
                f"the network does not accept images {self.image}: {str(error).splitlines()[0]}. "
                "Use another network, or images of a size that it accepts."
            ) from None
        if not inner and self.selected != "last":
            raise KshotError(
                f"features = {self.selected!r}: this network gives access to its last stage only. "
                "Set features = 'last', or use another network."
            )
        each = len(inner) // max(stages - 1, 1)  # parts of an inner stage
        return [*zip(*[iter(inner)] * each, strict=True), (last,)]

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode always: keep the running averages of pretraining, and apply no dropout."""
        return super().train(False)

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """Features (N, features) from the parts of the selected stages."""
        if self.selected == "last":
            return parts[0]
        return torch.cat([F.normalize(part) for part in parts], 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.assemble(self.pooled(images, self.stages))


class Resize(nn.Module):
    """Resizes images (N, C, H, W) in 0..1, RGB or grey, to (N, 3, size, size) as Pillow does, by constant matrices."""

    rows: Tensor
    columns: Tensor

    def __init__(self, image: tuple[int, int, int], size: int, kernel: str = "bicubic") -> None:
        super().__init__()
        self.unchanged = image[1:] == (size, size)
        self.register_buffer("rows", resize_matrix(image[1], size, kernel), persistent=False)
        self.register_buffer("columns", resize_matrix(image[2], size, kernel).t().contiguous(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1)
        if self.unchanged:
            return images
        wide = (images @ self.columns).clamp(0, 1)  # (N, 3, height, size)
        return (self.rows @ wide).clamp(0, 1)


def resize_matrix(before: int, after: int, kernel: str = "bicubic") -> Tensor:
    """The matrix (after, before) that resizes one dimension as Pillow's filter of this name does, with antialiasing."""
    identity = Image.fromarray(np.eye(before, dtype=np.float32))
    return torch.from_numpy(np.array(identity.resize((before, after), Image.Resampling[kernel.upper()])))


def spread(count: int, chosen: int = 5) -> list[int]:
    """At most `chosen` of the numbers 0..count - 1, evenly spaced, including the first and the last."""
    return sorted({round(i * (count - 1) / (chosen - 1)) for i in range(chosen)})


def pool(maps: Tensor) -> list[Tensor]:
    """Mean and standard deviation over positions, (N, C) each, of maps (N, C, H, W)."""
    mean = maps.mean((2, 3))
    return [mean, ((maps - mean[..., None, None]).square().mean((2, 3)) + 1e-12).sqrt()]


def load_start(backbone: Backbone, file: Path) -> None:
    """Load the weights in a file (a state dict, a learner.pt, or its folder); a KshotError if they do not fit."""
    file = file / "learner.pt" if file.is_dir() else file
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise KshotError(f"[backbone] start = {str(file)!r}: there is no such file") from None
    except Exception as error:  # torch and pickle raise many kinds
        raise KshotError(f"[backbone] start = {str(file)!r} holds no weights: {str(error).splitlines()[0]}") from None
    weights = content.get("weights", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict):
        raise KshotError(f"[backbone] start = {str(file)!r} holds no weights: it holds a {type(weights).__name__}")
    of_backbone = {k.removeprefix("backbone."): value for k, value in weights.items() if k.startswith("backbone.")}
    try:
        backbone.load_state_dict(of_backbone or weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise KshotError(
            f"[backbone] start = {str(file)!r} holds weights of another network: "
            f"{' '.join(str(error).split())[:300]}. Use the backbone and settings that they were trained with."
        ) from None
