"""torchvision's classification networks as backbones, with weights from a file or torchvision's cache."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import Backbone, KshotError, PretrainedBackbone, hookimpl, pool, spread, torchvision


class Torchvision(PretrainedBackbone):
    """A torchvision network without its last linear layer, on colours normalised as for ImageNet.

    Images are not resized; most networks were trained at 224. Inner stages are the last feature maps of each resolution
    but the lowest; in a transformer the class tokens and patch means of five blocks.
    """

    class Config(PretrainedBackbone.Config):
        model: str = Field("resnet18", description="a name that torchvision.models.list_models() gives")
        weights: str = Field("none", description="'none', 'default' (downloaded or cached), or a state dict's file")

    mean: Tensor
    std: Tensor

    def __init__(self, image: tuple[int, int, int], config: Config) -> None:
        super().__init__(image, config)
        self.learns_statistics = config.weights == "none" and not config.frozen
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self.network = _network(config).requires_grad_(not config.frozen).eval()
        _cut_last_linear(self.network, config.model)
        self.ends: list[str] = []
        with suppress(RuntimeError, AssertionError):  # it takes no such images: measure says so
            self.ends = _inner_ends(self.network, self._normalised(torch.zeros(1, *image)))
        self.widths = self.measure(len(self.ends) + 1)

    def pooled(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        outputs: list[Tensor] = []
        inner = [self.network.get_submodule(self.ends[stage]) for stage in stages if stage < len(self.ends)]

        def keep(module: nn.Module, _: object, output: Tensor) -> None:
            outputs.append(output)
            if len(inner) == len(stages) and module is inner[-1]:
                raise _Enough

        with suppress(_Enough), ExitStack() as hooks:
            for module in inner:
                hooks.enter_context(module.register_forward_hook(keep))
            made = self.network(self._normalised(images))
            outputs.append(getattr(made, "logits", made))  # without the auxiliary outputs of GoogLeNet and Inception
        return [part for output in outputs for part in _parts(output)]

    def train(self, mode: bool = True) -> Self:
        return nn.Module.train(self, mode and self.learns_statistics)

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.expand(-1, 3, -1, -1) - self.mean) / self.std  # grey as colour


class _Enough(Exception):  # noqa: N818  # no error: the last stage that is wanted has its output
    pass


def _parts(output: Tensor) -> list[Tensor]:
    """A pooled map (N, C, H, W); the class token and the patches' mean of tokens (N, 1 + patches, C); or features."""
    if output.dim() == 3:
        return [output[:, 0], output[:, 1:].mean(1)]
    return pool(output) if output.dim() == 4 else [output]


def _inner_ends(network: nn.Module, image: Tensor) -> list[str]:
    """The modules whose outputs are the inner stages, found with hooks on a pass of an image (1, 3, H, W)."""
    maps: dict[str, dict[torch.Size, str]] = defaultdict(dict)  # by container: the last child at each resolution
    tokens: dict[str, list[str]] = defaultdict(list)

    def watch(name: str, output: Any) -> None:
        container = name.rpartition(".")[0]
        if isinstance(output, Tensor) and output.dim() == 3:
            tokens[container].append(name)
        elif isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] > 1:
            maps[container][output.shape[2:]] = name

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in network.named_modules():
            hooks.enter_context(module.register_forward_hook(lambda _, __, output, name=name: watch(name, output)))
        network(image)
    trunk = max(maps.values(), key=len, default={})  # the outermost of the longest
    blocks = max(tokens.values(), key=len, default=[])
    sides = [side for _, side in trunk]
    if len(trunk) > 2 and sides == sorted(sides, reverse=True):
        return list(trunk.values())[:-1]
    return [blocks[i] for i in spread(len(blocks) - 1)] if len(trunk) < 3 <= len(blocks) else []


def _network(config: Torchvision.Config) -> nn.Module:
    models = torchvision().models
    names = models.list_models(module=models)
    if config.model not in names:
        close = difflib.get_close_matches(config.model, names, n=3)
        raise KshotError(f"torchvision has no network {config.model!r}; near it: {', '.join(close) or 'none'}")
    if config.weights == "none":
        return models.get_model(config.model)
    if config.weights == "default":
        try:
            return models.get_model(config.model, weights="DEFAULT")
        except OSError as error:
            raise KshotError(
                f"the weights of {config.model} are not cached and could not be downloaded ({error}). "
                f"Set weights to a file with its state dict."
            ) from None
    network = models.get_model(config.model)
    path = Path(config.weights)
    try:
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    except FileNotFoundError:
        raise KshotError(f"there are no weights at {path}") from None
    except Exception as error:
        raise KshotError(f"{path} does not hold a state dict of {config.model}: {str(error).splitlines()[0]}") from None
    return network


def _cut_last_linear(network: nn.Module, model: str) -> None:
    """Replace the network's last linear layer by the identity, so that its inputs, the features, are returned."""
    linear = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise KshotError(f"torchvision's {model!r} ends in no linear layer, whose inputs would be the features")
    name, _ = linear[-1]
    network.set_submodule(name, nn.Identity())


@hookimpl
def kshot_backbones() -> Mapping[str, type[Backbone]]:
    return {"torchvision": Torchvision}
