"""The contract of an algorithm: a learner adapts to a support set and then classifies, and remembers nothing between.

An author writes `adapt` and `classify`, or, for one that adapts in steps, `begin`, `step` and `classify` of an
`InnerLoop`; training, evaluation, ONNX export, serving and the conformance kit follow from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.func import functional_call

from kshot.norms import BY_ITSELF, Norm, recorded

if TYPE_CHECKING:
    from kshot.backbones import Backbone
    from kshot.episodes import Episode, Episodes

State = dict[str, Tensor]
"""What adapting gives: named float32 tensors. Prototypes for a metric learner, fast weights for MAML."""

_WEIGHTS = "backbone."
_STATISTICS = "statistics."

EMBEDDING = (_WEIGHTS, _STATISTICS)
"""How the names of those state entries begin that change what `embed` makes of an image."""


class LearnerConfig(BaseModel):
    """A learner's settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    norm: Norm = Field("running", description="where the backbone's normalisation takes its statistics from")


class Learner(nn.Module, ABC):
    """A backbone, and a way to turn a support set into a classifier. Holds no memory between calls.

    Images are float, (count, channels, height, width), in 0..1. Labels are int64 ids; `classes` (W,) lists the ids
    in the order of the logits, and is a tensor so that the number of ways stays free in the exported graph.
    """

    name: ClassVar[str]
    Config: ClassVar[type[LearnerConfig]] = LearnerConfig

    def __init__(self, backbone: Backbone, config: LearnerConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config

    @abstractmethod
    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        """Learn from a support set: (S, C, H, W) float, (S,) int64, the ids of the classes (W,) int64."""

    @abstractmethod
    def classify(self, state: State, query: Tensor) -> Tensor:
        """Logits (Q, W) for query (Q, C, H, W), each row independent of the others."""

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """What the outer loop minimises over a batch of episodes: a scalar, by default the queries' cross-entropy."""
        return torch.stack([self.query_loss(episode) for episode in episodes]).mean()

    def query_loss(self, episode: Episode) -> Tensor:
        """Cross-entropy of one episode's queries after adapting to its support set: a scalar."""
        state = self.adapt(episode.support, episode.support_labels, episode.classes)
        if self.config.norm == "transductive":
            state = transductive(state)
        targets = one_hot(episode.query_labels, episode.classes)
        return cross_entropy(self.classify(state, episode.query), targets)

    def stepped(self) -> None:
        """After each outer step, which may have taken several calls of `meta_loss`: for learners that count them."""

    def prepare(self, classes: Sequence[int]) -> None:
        """Before meta-training: make what only that needs, say a head over all classes of the training split.

        `classes` counts them, a number for each data set that the split joins (most often one).
        """

    @property
    def surrogate(self) -> bool:
        """Whether `meta_loss` is no loss to descend, but has the outer update's direction for its gradient.

        So it is for first-order approximations, for Reptile, and for the two sides of an adversarial game. The
        conformance kit then does not compare that gradient with finite differences.
        """
        return False

    def embed(self, images: Tensor, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Features (N, D), with the backbone's weights and support statistics taken from `state` where it has them."""
        held = (
            {}
            if state is None
            else {
                name.removeprefix(prefix): value
                for name, value in state.items()
                for prefix in EMBEDDING
                if name.startswith(prefix)
            }
        )
        return functional_call(self.backbone, held, (images,)) if held else self.backbone(images)

    def measure(self, images: Tensor, state: Mapping[str, Tensor] | None = None) -> tuple[Tensor, State]:
        """Features (N, D) of a support set, and its statistics as state entries; none unless `norm` needs them."""
        with recorded(self.backbone) as statistics:
            features = self.embed(images, state)
        return features, {_STATISTICS + name: value for name, value in statistics.items()}

    def embed_episodes(self, episodes: Episodes) -> Iterator[tuple[Episode, Tensor, Tensor]]:
        """Each episode with the features of its support set (S, D) and of its queries (Q, D): for a `meta_loss`.

        One pass of the backbone over all images where `norm` allows it; batch statistics are then of all of them.
        """
        if self.config.norm in BY_ITSELF:
            images = torch.cat([episodes.support.flatten(0, 1), episodes.query.flatten(0, 1)])
            shape, count = episodes.shape, len(episodes)
            sizes = [shape.ways * shape.shots] * count + [shape.ways * shape.queries] * count
            parts = self.embed(images).split(sizes)
            yield from zip(episodes, parts[:count], parts[count:], strict=True)
            return
        for episode in episodes:
            features, statistics = self.measure(episode.support)
            held = None if self.config.norm == "transductive" else statistics
            yield episode, features, self.embed(episode.query, held)

    def weights(self) -> State:
        """The backbone's parameters as state entries: what an inner loop changes."""
        return {_WEIGHTS + name: parameter for name, parameter in self.backbone.named_parameters()}


class InnerLoop(Learner):
    """A learner that adapts in steps. `adapt` is written: `begin`, then `step` as often as asked, then `finish`.

    The exporter traces `begin` and one `step`, and wraps the step in an ONNX Loop: the number of steps stays free.
    Gradients come from `kshot.gradient` only.
    """

    @property
    @abstractmethod
    def steps(self) -> int:
        """Inner steps taken when nobody asks for another number: while meta-training, and after (`self.training`)."""

    @abstractmethod
    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        """The state after one more step, with the same names and shapes; `i` is the step's number, int64 ()."""

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state that `classify` takes; by default the last step's."""
        return state

    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor, steps: int | None = None) -> State:
        """Learn from a support set in `steps` steps, `self.steps` unless told."""
        state = self.begin(support, labels, classes)
        for i in range(self.steps if steps is None else steps):
            state = self.step(state, support, labels, classes, torch.tensor(i))
        return self.finish(state, support, labels, classes)


def transductive(state: State) -> State:
    """The state without its support statistics: queries are then normalised by their own batch, as papers often do.

    An answer then depends on its companions, so this is for comparing with published figures, never for serving.
    """
    return {name: value for name, value in state.items() if not name.startswith(_STATISTICS)}


def one_hot(labels: Tensor, classes: Tensor) -> Tensor:
    """(N, W) float: 1 where a label (N,) is the class of that column (W,). Labels need not be 0..W-1."""
    return (labels[:, None] == classes[None, :]).float()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N, W) to one-hot targets (N, W): a scalar."""
    return -(targets.to(logits.dtype) * logits.log_softmax(1)).sum(1).mean()


def class_means(features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Mean feature of each class: (W, D) from features (S, D). Shots may differ between classes."""
    members = one_hot(labels, classes).to(features.dtype)  # (S, W)
    return members.t() @ features / members.sum(0).clamp_min(1)[:, None]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances (A, B) between rows of a (A, D) and b (B, D), without the cdist that ONNX lacks."""
    return ((a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * a @ b.t()).clamp_min(0)
