"""Conv4: the four-block convolutional network commonly used to compare few-shot algorithms.

With pooling as in Vinyals et al., 2016 (https://arxiv.org/abs/1606.04080) and Snell et al., 2017; with strided
convolutions instead as in the Omniglot experiments of Finn et al., 2017 (https://arxiv.org/abs/1703.03400).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kshot import Backbone, BackboneConfig, KshotError, channels_last, convolve, hookimpl, make_norm


class Conv4(Backbone):
    """Four blocks of 3x3 convolution, normalisation, ReLU and downsampling by 2, then flattened or averaged."""

    class Config(BackboneConfig):
        width: int = Field(64, ge=1, description="channels of every block")
        downsample: Literal["pool", "stride"] = Field("pool", description="halve by max-pooling or by stride 2")
        halvings: int = Field(4, ge=1, le=4, description="number of blocks, from the first, that downsample by 2")
        mean: bool = Field(False, description="average over positions instead of flattening")

    def __init__(self, image: tuple[int, int, int], config: Config) -> None:
        super().__init__(image, config)
        channels, height, width = image
        bias = self.norm == "group"  # batch normalisation would cancel it
        blocks: list[nn.Module] = []
        self.convolutions: list[tuple[int, int]] = []  # the place of each in `blocks`, and the size of pooling windows
        for i in range(4):
            halve = i < config.halvings
            stride = 2 if halve and config.downsample == "stride" else 1
            self.convolutions.append((len(blocks), 2 if halve and stride == 1 else 1))
            blocks += [
                nn.Conv2d(channels if i == 0 else config.width, config.width, 3, stride, padding=1, bias=bias),
                make_norm(self.norm, config.width),
                nn.ReLU(),
            ]
            if halve and config.downsample == "pool":
                blocks.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            elif halve:
                height, width = (height + 1) // 2, (width + 1) // 2
        if height < 1 or width < 1:
            side = 2**config.halvings
            raise KshotError(
                f"conv4 halves an image {config.halvings} times: it needs {side} pixels a side, and this one is {image}"
            )
        self.blocks = nn.Sequential(*blocks)
        self.mean = config.mean
        self.grid = None if config.mean else (config.width, height, width)
        self.features = config.width * (1 if config.mean else height * width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        maps = channels_last(images)
        for place, pool in self.convolutions:
            maps = F.relu(convolve(maps, self.blocks[place], self.blocks[place + 1], pool))
        return maps.mean((2, 3)) if self.mean else maps.flatten(1)  # of (N, width, height, width)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept state dicts of earlier versions, whose convolutions had biases that batch normalisation cancels."""
        for place, _ in self.convolutions if self.norm != "group" else ():
            bias, mean = state_dict.pop(f"{prefix}blocks.{place}.bias", 0), f"{prefix}blocks.{place + 1}.running_mean"
            if mean in state_dict:
                state_dict[mean] = state_dict[mean] - bias
        super()._load_from_state_dict(state_dict, prefix, *args)


@hookimpl
def kshot_backbones() -> Mapping[str, type[Backbone]]:
    return {"conv4": Conv4}
