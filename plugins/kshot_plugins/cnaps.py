"""CNAPs: a network that encodes the support set generates weights of the classifying network, without gradient steps.

Requeima et al., 2019: Conditional Neural Adaptive Processes. https://arxiv.org/abs/1906.07697
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import (
    Backbone,
    Episode,
    KshotError,
    Learner,
    LearnerConfig,
    State,
    SupportNorm,
    class_means,
    cross_entropy,
    hookimpl,
    make_norm,
    one_hot,
)

_NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, SupportNorm)


class CNAPs(Learner):
    """Generates the scale and shift of every normalisation layer (FiLM), then a head row per class.

    A set encoder averages over the support images, so their order and number do not matter; queries are not used. The
    generated values are added to the backbone's scales and shifts, and to the nearest-class-mean head (for a mean
    feature m with D entries, row 2m / √D and bias -|m|² / √D). They start at zero, so training starts from an
    unmodulated prototypical network.

    Differs from the paper: it freezes a ResNet-18 pretrained on ImageNet, and here everything is meta-trained together;
    its autoregressive variant, where a layer's scale depends on the layers before it, is left out. As in the paper, the
    set encoder is a separate network, so that the backbone's running averages are of the modulated backbone only.

    Good for episodes of different kinds: the backbone adapts to the support set without gradient steps. Label spaces
    cannot share embeddings, because each has different backbone weights.
    """

    name = "cnaps"

    class Config(LearnerConfig):
        width: int = Field(64, ge=8, le=1024, description="size of the set's representation and of hidden layers")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        width, features = config.width, backbone.features
        self.affine = _affine(backbone)
        blocks: list[nn.Module] = []
        for channels in (backbone.image[0], width, width):
            blocks += [nn.Conv2d(channels, width, 3, stride=2, padding=1), make_norm("group", width), nn.ReLU()]
        self.set_encoder = nn.Sequential(*blocks)
        self.film = _generator(width, width, sum(self.affine.values()))
        self.row = _generator(features, width, features + 1)

    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        modulated = self.modulate(support)
        features, statistics = self.measure(support, modulated)
        return {**modulated, **statistics, **self.head(class_means(features, labels, classes))}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self.embed(query, state) @ state["head.weight"].t() + state["head.bias"]

    def modulate(self, support: Tensor) -> State:
        """The backbone's scales and shifts for this support set, as state entries that `embed` uses."""
        weights = self.weights()
        task = self.set_encoder(support).mean((0, 2, 3))  # (width,)
        additions = dict(zip(self.affine, self.film(task).split(list(self.affine.values())), strict=True))
        return {name: weights[name] + more.view_as(weights[name]) for name, more in additions.items()}

    def head(self, means: Tensor) -> State:
        """Rows (W, D) and biases (W,) of the head from the classes' mean features (W, D)."""
        more = self.row(means)  # (W, D + 1)
        scale = self.backbone.features**-0.5  # keeps initial logits of order one for any number of features
        return {
            "head.weight": 2 * scale * means + more[:, :-1],
            "head.bias": -scale * means.square().sum(1) + more[:, -1],
        }

    def query_loss(self, episode: Episode) -> Tensor:
        """Embed support and query in one pass of the modulated backbone, so that batch statistics are of both."""
        if self.backbone.norm in ("support", "batch"):
            return super().query_loss(episode)
        images = torch.cat([episode.support, episode.query])
        features = self.embed(images, self.modulate(episode.support))
        support, query = features.split([len(episode.support), len(episode.query)])
        head = self.head(class_means(support, episode.support_labels, episode.classes))
        logits = query @ head["head.weight"].t() + head["head.bias"]
        return cross_entropy(logits, one_hot(episode.query_labels, episode.classes))


def _affine(backbone: Backbone) -> dict[str, int]:
    """The state names of the scales and shifts of the backbone's normalisation layers, and their sizes."""
    found = {
        f"backbone.{layer}.{name}": parameter.numel()
        for layer, module in backbone.named_modules()
        if isinstance(module, _NORMS)
        for name, parameter in module.named_parameters()
    }
    if not found:
        raise KshotError(
            f"cnaps sets the scale and shift of normalisation layers, and {type(backbone).__name__} has none "
            f"that learns them. Take a backbone that normalises, such as conv4 or resnet12."
        )
    return found


def _generator(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """A small network whose output is initially zero."""
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), last)


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [CNAPs]
