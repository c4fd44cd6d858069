"""Reptile: train on one episode with an ordinary optimiser, then move the initialisation towards the resulting weights.

Nichol, Achiam and Schulman, 2018. https://arxiv.org/abs/1803.02999
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from kshot import Backbone, Episode, Episodes, Learner, State, gradient, hookimpl
from kshot_plugins.gradient_learner import HEAD, GradientLearner

_MOMENT = "second_moment."
_EPSILON = 1e-5  # Adam's; with 1e-8, an untrained learner, without moments yet, takes full steps along rounding errors


class Reptile(GradientLearner):
    """Inner steps are Adam without momentum (beta1 = 0): in meta-training on minibatches of an episode's images,
    support and query alike, in adapting on the whole support set, so that its order does not matter.

    Adam's second moments persist between episodes, as in the authors' code, and adapting starts from those at the end
    of meta-training. They are buffers, so checkpoints and bundles contain them. The moments of an episode's head rows
    start at the mean over the rows of earlier heads.

    `meta_loss` is half the squared distance to the weights after adapting to the episodes, which are constants. Its
    gradient is minus the paper's update, so plain gradient descent at rate epsilon (`optimizer = "sgd"`,
    `momentum = 0`) is the paper's interpolation. Only weights are interpolated, not running averages.

    Differs from the paper: the head starts at zero in each episode and is not learned, so any number of ways works.

    Good for simple meta-training without second derivatives or a query set. It needs many inner steps and more than one
    shot, and adapting is the slowest of all learners.
    """

    name = "reptile"

    class Config(GradientLearner.Config):
        steps: int = Field(5, ge=1, description="inner steps on each training episode, a minibatch each")
        eval_steps: int | None = Field(50, ge=0, description="inner steps afterwards; `steps` if unset")
        batch: int = Field(10, ge=1, description="images of a minibatch in meta-training")
        rate: float = Field(1e-3, gt=0, description="inner learning rate of Adam")
        beta2: float = Field(0.999, ge=0, lt=1, description="decay of Adam's second moments")

    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        head = {HEAD[0]: torch.zeros(backbone.features), HEAD[1]: torch.zeros(())}  # of any row
        self.moments = nn.Module()
        for name, weight in {**self.weights(), **head}.items():
            self.moments.register_buffer(name.replace(".", "_"), torch.zeros_like(weight))
        self.inner_steps = nn.Buffer(torch.tensor(0))  # taken in all episodes, for Adam's bias correction

    @property
    def surrogate(self) -> bool:
        return True

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """Half the squared distance between the weights and those adapted to each episode, averaged over episodes."""
        distances = []
        for episode in episodes:
            goal = self.trained(episode)
            distances.append(torch.stack([(w - goal[name]).square().sum() for name, w in self.weights().items()]).sum())
        return torch.stack(distances).mean() / 2

    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        fast = super().begin(support, labels, classes)
        moments = zip(fast.items(), self.moments.buffers(), strict=True)
        return {**fast, **{_MOMENT + name: moment.expand_as(value) for (name, value), moment in moments}}

    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        fast = _without_moments(state)

        def loss(fast: State) -> Tensor:
            return self.support_loss(fast, support, labels, classes)

        beta2, moved = self.config.beta2, {}
        bias = 1 - beta2 ** (self.inner_steps + i + 1).to(support.dtype)
        for name, slope in gradient(loss, fast).items():
            # A head row learns from its own class, a share 1/W of the mean loss: times W, its moments fit any ways.
            scale = classes.shape[0] if name in HEAD else 1
            moment = beta2 * state[_MOMENT + name] + (1 - beta2) * (scale * slope).square()
            moved[name] = fast[name] - self.config.rate * scale * slope / ((moment / bias).sqrt() + scale * _EPSILON)
            moved[_MOMENT + name] = moment
        return moved

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return super().finish(_without_moments(state), support, labels, classes)

    @torch.no_grad()
    def trained(self, episode: Episode) -> State:
        """The state after `steps` minibatches of an episode's images; in training it also updates the moments."""
        images = torch.cat([episode.support, episode.query])
        labels = torch.cat([episode.support_labels, episode.query_labels])
        state = self.begin(images, labels, episode.classes)
        for i, chosen in enumerate(minibatches(len(images), self.config.batch, self.config.steps, images.device)):
            state = self.step(state, images[chosen], labels[chosen], episode.classes, torch.tensor(i))
        if self.training:
            self.inner_steps.add_(self.config.steps)
            for kept, name in zip(self.moments.buffers(), _without_moments(state), strict=True):
                moment = state[_MOMENT + name]
                kept.copy_(moment.mean(0) if name in HEAD else moment)
        return state


def minibatches(images: int, size: int, count: int, device: torch.device | None = None) -> tuple[Tensor, ...]:
    """Image indices of `count` minibatches, shuffled so that every image is used once before any is repeated."""
    rounds = math.ceil(size * count / images)
    return torch.cat([torch.randperm(images, device=device) for _ in range(rounds)])[: size * count].split(size)


def _without_moments(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith(_MOMENT)}


@hookimpl
def kshot_learners() -> Sequence[type[Learner]]:
    return [Reptile]
