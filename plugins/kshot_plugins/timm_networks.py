"""timm's networks as backbones, `[backbone] name = "timm/NAME"`, with weights from a file, the hub or its cache.

Wightman, 2019, PyTorch Image Models. https://github.com/huggingface/pytorch-image-models
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from kshot import Backbone, KshotError, PretrainedBackbone, Resize, hookimpl, pool, spread, torchvision


class Timm(PretrainedBackbone):
    """Grey or colour images of any size to the features of a timm network, as timm pools them.

    Resizing and normalisation, as in pretraining, are part of the backbone and so of a bundle's graph. Inner stages are
    at most five intermediate outputs: pooled feature maps, or in a transformer with a class token, that token and the
    mean of the patches.
    """

    class Config(PretrainedBackbone.Config):
        weights: str = Field(
            "default",
            description="'default' (the hub's cache, or a download), 'none', or a .safetensors, .pth or .bin file",
        )
        size: int | None = Field(
            None, ge=16, le=1024, description="side in pixels that images are resized to; as in pretraining if unset"
        )

    name: ClassVar[str]
    mean: Tensor
    std: Tensor

    @classmethod
    def named(cls, name: str) -> type[Self]:
        """The backbone timm/`name`; a KshotError with the nearest names if timm has no such network."""
        names = {*_timm().list_models(), *_timm().list_pretrained()}
        if name not in names:
            close = difflib.get_close_matches(name, sorted(names), n=3)
            raise KshotError(f"timm has no network {name!r}; near it: {', '.join(close) or 'none'}")
        return type(cls.__name__, (cls,), {"name": name, "__module__": __name__, "__doc__": cls.__doc__})

    def __init__(self, image: tuple[int, int, int], config: Config) -> None:
        super().__init__(image, config)
        facts = _timm().get_pretrained_cfg(self.name)
        size = config.size or facts.input_size[-1]
        self.resize = Resize(image, size, facts.interpolation)
        self.register_buffer("mean", torch.tensor(facts.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(facts.std)[:, None, None], persistent=False)
        self.network: Any = _network(self.name, facts, size, config.weights).requires_grad_(not config.frozen).eval()
        shows = getattr(self.network, "forward_intermediates", None)
        self.blocks = spread(len(self.network.feature_info) - 1) if shows else []
        token = getattr(self.network, "cls_token", None) is not None
        self.tokens = token and "return_prefix_tokens" in inspect.signature(shows or len).parameters
        try:
            self.widths = self.measure(len(self.blocks) + 1)
        except KshotError:  # in some networks, such as Hiera, the last intermediate output differs from the features
            self.blocks = []
            self.widths = self.measure(1)

    def pooled(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        network, last = self.network, len(self.blocks)
        images = (self.resize(images) - self.mean) / self.std
        if stages[0] == last:
            return [network(images)]
        inner: dict[str, Any] = {"indices": [self.blocks[stage] for stage in stages if stage < last]}
        if self.tokens:
            inner["return_prefix_tokens"] = True
        if last not in stages:
            return self._parts(network.forward_intermediates(images, **inner, intermediates_only=True, stop_early=True))
        final, outputs = network.forward_intermediates(images, **inner)
        return [*self._parts(outputs), network.forward_head(final, pre_logits=True)]

    def _parts(self, outputs: Sequence[Any]) -> list[Tensor]:
        """The pooled maps (N, C, H, W); of pairs of a map and tokens (N, T, C) the class token and the map's mean."""
        if self.tokens:
            return [part for maps, tokens in outputs for part in (tokens[:, 0], pool(maps)[0])]
        return [part for maps in outputs for part in pool(maps)]


@cache
def _timm() -> ModuleType:
    torchvision()  # first: timm imports it
    try:
        import timm
    except ImportError:
        raise KshotError("the backbones timm/NAME need one more package: pip install 'kshot[pretrained]'") from None
    return timm


def _network(name: str, facts: Any, size: int, weights: str) -> Any:
    """The network without its classifier, built for this image size if it accepts only one."""
    options: dict[str, Any] = {"img_size": size} if facts.fixed_input_size else {}
    if weights not in ("default", "none"):  # with as many classes as the file has, so that all of it must fit
        head = facts.classifier if isinstance(facts.classifier, str) else next(iter(facts.classifier or ()), "")
        classes = len(_read(weights).get(f"{head}.weight", ()))
        options["pretrained_cfg_overlay"] = {"file": weights, "num_classes": classes, "label_offset": 0}
    try:
        with _answering_hub() if weights == "default" else nullcontext():
            network: Any = _timm().create_model(name, pretrained=weights != "none", **options)
    except Exception as error:  # of the hub, its transport, torch or the network itself
        raise KshotError(_reason(name, facts, weights, " ".join(str(error).split())[:300])) from None
    network.reset_classifier(0)
    return network


def _read(weights: str) -> dict[str, Tensor]:
    try:
        held: dict[str, Tensor] = _timm().models.load_state_dict(weights)
    except FileNotFoundError:
        raise KshotError(f"[backbone] weights = {weights!r}: there is no such file") from None
    except Exception as error:  # torch, pickle and safetensors raise many kinds
        raise KshotError(f"[backbone] weights = {weights!r} holds no weights: {str(error).splitlines()[0]}") from None
    return held


@contextmanager
def _answering_hub() -> Iterator[None]:
    """Configure the hub's client within the block: if no hub answers, it falls back to its cache within seconds."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    offline = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever transport
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _reason(name: str, facts: Any, weights: str, what: str) -> str:
    if weights == "none":
        return f"timm cannot build {name!r}: {what}"
    if weights != "default":
        return f"[backbone] weights = {weights!r} does not fit timm's {name!r}: {what}"
    if not facts.has_weights:
        return f"there are no weights for timm's {name!r}: set weights = 'none', or to a file of your own"
    return (
        f"the weights of timm/{name} could not be loaded: {what.partition('. ')[0].removesuffix('.')}. Fetch "
        f"{facts.hf_hub_filename or 'model.safetensors'} of {facts.hf_hub_id or facts.url} where there is a network "
        f"(licence: {facts.license or 'not stated'}), and set [backbone] weights to the path of that file."
    )


@hookimpl
def kshot_backbones() -> Mapping[str, type[Backbone]]:
    return {"timm/*": Timm}
