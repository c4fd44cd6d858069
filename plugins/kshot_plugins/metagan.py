"""MetaGAN: prototypical networks trained adversarially, with generated images as an additional fake class.

Zhang, Che, Ghahramani, Bengio and Song, 2018.
https://papers.nips.cc/paper_files/paper/2018/hash/4e4e53aa080247bc31d0eb4e7aeb07a0-Abstract.html
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kshot import (
    Episode,
    Episodes,
    FeatureLearner,
    Learner,
    LearnerConfig,
    State,
    class_means,
    cross_entropy,
    hookimpl,
    one_hot,
    squared_distances,
    without_statistics,
)


class MetaGAN(FeatureLearner):
    """Meta-trains a prototypical network and a generator adversarially; only the prototypical network is exported.

    The paper uses relation networks and MAML; prototypes train faster. An image is classified as fake if its squared
    distance to every prototype exceeds a learned threshold. The fake class exists only in training, so no query is
    classified as fake. The generator's input is the mean of an episode's prototypes and noise, not the queries.

    Good for the same tasks as prototypical networks, with tighter class boundaries according to the paper. Training
    takes 1.5 times as long; adapting and classifying cost the same.
    """

    name = "metagan"
    coupled = ()  # its episodes pass the backbone one by one

    class Config(LearnerConfig):
        weight: float = Field(
            0.1, ge=0, description="weight of the real-or-fake loss relative to the classification loss; 1 in the paper"
        )
        fakes: int = Field(1, ge=1, description="generated images per class of an episode")
        noise: int = Field(100, ge=1, description="width of the generator's random input")
        width: int = Field(64, ge=1, description="channels of the generator")

    config: Config

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {"prototypes": class_means(features, labels, classes)}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return -squared_distances(features, state["prototypes"])

    def prepare(self, classes: Sequence[int]) -> None:
        """Create the generator and the fake class's threshold, which are not exported."""
        width = self.backbone.features
        self.generator = Generator(self.config.noise + width, self.config.width, self.backbone.image)
        self.log_threshold = nn.Parameter(torch.tensor(width / 8).log())  # distances grow with the width

    @property
    def surrogate(self) -> bool:
        return True  # the sum of two players' losses, each of which moves one player only

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """The sum of both losses. Each weight gets gradient from its own loss only, so one optimiser trains both."""
        return torch.stack([loss for episode in episodes for loss in self.losses(episode)]).sum() / len(episodes)

    def losses(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """The discriminator's loss (classes, and real or fake), and the generator's (fakes classified as real)."""
        state = self.adapt(episode.support, episode.support_labels, episode.classes)
        if self.backbone.norm == "batch":
            state = without_statistics(state)
        threshold = self.log_threshold.exp()
        fakes = self.make(state["prototypes"].detach())
        # Running averages are of real images: copies take their place while fakes, a batch of their own, pass.
        averages = {f"backbone.{name}": value.clone() for name, value in self.backbone.named_buffers()}
        frozen = {name: value.detach() for name, value in {**self.weights(), **averages, **state}.items()}

        logits = self.classify(state, episode.query)
        found = _real(self.classify({**averages, **state}, fakes.detach()), threshold)
        fooled = _real(self.classify(frozen, fakes), threshold.detach())
        game = F.softplus(-_real(logits, threshold)).mean() + F.softplus(found).mean()
        # With weight 1 this is the paper's one softmax, as log p(y) = log p(y | real) + log p(real).
        apart = cross_entropy(logits, one_hot(episode.query_labels, episode.classes))
        return apart + self.config.weight * game, F.softplus(-fooled).mean()

    def make(self, prototypes: Tensor) -> Tensor:
        """Fake images (fakes * W, C, H, W) for an episode with these prototypes (W, D)."""
        count = self.config.fakes * prototypes.shape[0]
        noise = prototypes.new_empty(count, self.config.noise).normal_()
        fakes: Tensor = self.generator(torch.cat([noise, prototypes.mean(0).expand(count, -1)], 1))
        return fakes


def _real(logits: Tensor, threshold: Tensor) -> Tensor:
    """Log odds (N,) that images with these class logits (N, W) are real; the fake class's logit is -threshold."""
    return logits.logsumexp(1) + threshold


class Generator(nn.Module):
    """Codes (N, D) to images (N, C, H, W) in 0..1: upsamples a small map until it covers the image, then crops it."""

    def __init__(self, code: int, width: int, image: tuple[int, int, int]) -> None:
        super().__init__()
        channels, self.height, self.width = image
        doublings = max(1, math.ceil(math.log2(max(self.height, self.width) / 7)))
        small = (width, math.ceil(self.height / 2**doublings), math.ceil(self.width / 2**doublings))
        layers: list[nn.Module] = [nn.Linear(code, math.prod(small)), nn.Unflatten(1, small)]
        for i in range(doublings):
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.ConvTranspose2d(width, width if i < doublings - 1 else channels, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, codes: Tensor) -> Tensor:
        images: Tensor = self.layers(codes)
        return images[..., : self.height, : self.width]


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [MetaGAN]
