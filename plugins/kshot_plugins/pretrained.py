"""Any of torchvision's classification networks as a backbone, with the weights of a file or of torchvision's cache."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from kshot import Backbone, hookimpl
from kshot.backbones import BackboneConfig
from kshot.norms import Norm
from kshot.vision import torchvision
from kshot_runtime.errors import KshotError


class Torchvision(Backbone):
    """A torchvision network up to its last linear layer, after normalising colours as ImageNet networks expect.

    It sees images at the size at which they were imported; most networks were trained at 224.
    """

    class Config(BackboneConfig):
        model: str = Field("resnet18", description="a name that torchvision.models.list_models() gives")
        weights: str = Field("none", description="'none', 'default' (downloaded or cached), or a state dict's file")

    mean: Tensor
    std: Tensor

    def __init__(self, image: tuple[int, int, int], norm: Norm, config: Config) -> None:
        super().__init__(image, norm, config)
        if norm != "running":
            raise KshotError(f"torchvision networks bring their own normalisation: set norm = 'running', not {norm!r}")
        self.network = _network(config)
        self.features = _cut_last_linear(self.network, config.model)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self._check(config.model)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.expand(-1, 3, -1, -1) - self.mean) / self.std)  # grey as colour

    def _check(self, model: str) -> None:
        """Try it, in shapes only: some take images of one size, or give more than features while they train."""
        images = torch.zeros(2, *self.image, device="meta")
        held = {name: held.to("meta") for name, held in (*self.named_parameters(), *self.named_buffers())}
        try:
            for training in (False, True):
                if (made := functional_call(self.train(training), held, (images,)).shape) != (2, self.features):
                    raise ValueError(f"it gives {tuple(made)} for two of them, and features are (2, {self.features})")
        except Exception as error:
            raise KshotError(
                f"torchvision's {model!r} makes no features of images {self.image}: {str(error).splitlines()[0]}. "
                "Take another network, or images of the size that this one was made for."
            ) from None


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
                f"the weights of {config.model} are neither cached nor to be had ({error}). "
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


def _cut_last_linear(network: nn.Module, model: str) -> int:
    """Replace the network's last linear layer by nothing; its inputs are the features."""
    linear = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise KshotError(f"torchvision's {model!r} ends in no linear layer, whose inputs would be the features")
    name, last = linear[-1]
    network.set_submodule(name, nn.Identity())
    return last.in_features


@hookimpl
def kshot_backbones() -> Mapping[str, type[Backbone]]:
    return {"torchvision": Torchvision}
