"""ResNet-12: the residual network commonly used in few-shot learning.

Oreshkin, Rodríguez López and Lacoste, 2018 (https://arxiv.org/abs/1805.10123); widths as in Lee et al., 2019
(https://arxiv.org/abs/1904.03758) or narrower. Without DropBlock, so that a forward pass is deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kshot import Backbone, BackboneConfig, KshotError, Norm, channels_last, convolve, hookimpl, make_norm


class _Block(nn.Module):
    """Three 3x3 convolutions with a 1x1 shortcut, then downsampling by 2."""

    def __init__(self, inputs: int, width: int, norm: Norm) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Conv2d(inputs if i == 0 else width, width, 3, padding=1, bias=False), make_norm(norm, width)]
            if i < 2:
                layers.append(nn.LeakyReLU(0.1))
        self.layers = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), make_norm(norm, width))

    def forward(self, maps: Tensor) -> Tensor:
        inner = convolve(maps, self.layers[0], self.layers[1])
        for i in (3, 6):
            inner = convolve(F.leaky_relu(inner, 0.1), self.layers[i], self.layers[i + 1])
        shortcut = convolve(maps, self.shortcut[0], self.shortcut[1])
        return F.leaky_relu(F.max_pool2d(inner + shortcut, 2), 0.1)


class ResNet12(Backbone):
    """Four residual blocks, then global average pooling."""

    class Config(BackboneConfig):
        widths: tuple[int, int, int, int] = Field((64, 160, 320, 640), description="channels of the four blocks")

    def __init__(self, image: tuple[int, int, int], config: Config) -> None:
        super().__init__(image, config)
        channels, height, width = image
        if min(height, width) < 16:
            raise KshotError(f"resnet12 halves an image four times, so it needs 16 pixels a side; this one is {image}")
        self.blocks = nn.Sequential(
            *(_Block(i, w, self.norm) for i, w in zip((channels, *config.widths), config.widths, strict=False))
        )
        self.features = config.widths[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.1, nonlinearity="leaky_relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(channels_last(images)).mean((2, 3))


@hookimpl
def kshot_backbones() -> Mapping[str, type[Backbone]]:
    return {"resnet12": ResNet12}
