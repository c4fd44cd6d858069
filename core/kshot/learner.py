"""The contract of an algorithm: a learner adapts to a support set and then classifies, and remembers nothing between.

Most learners are heads on features (`FeatureLearner`): an author writes `fit` and `logits`, or for a head that is
fitted in steps (`FeatureLoop`) `start`, `update` and `logits`. One that changes the backbone in steps (`InnerLoop`) has
`begin`, `step` and `classify`; any other (`Learner`) `adapt` and `classify`. Training, evaluation, ONNX export, serving
and the conformance kit follow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.func import functional_call, vmap

from kshot.norms import BY_ITSELF, Norm, recorded
from kshot.ops import cross_entropy, one_hot
from kshot_runtime.manifest import nearest_shots

if TYPE_CHECKING:
    from kshot.backbones import Backbone
    from kshot.data.episodes import Episode, Episodes

State = dict[str, Tensor]
"""The result of adapting: named float32 tensors. Prototypes for a metric learner, fast weights for MAML."""

_WEIGHTS = "backbone."
_STATISTICS = "statistics."
_PREFIXES = (_WEIGHTS, _STATISTICS)  # of state entries that override backbone weights or statistics in `embed`


class LearnerConfig(BaseModel):
    """A learner's settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Learner(nn.Module, ABC):
    """A backbone, and a way to turn a support set into a classifier. Holds no memory between calls.

    Images are float, (count, channels, height, width), in 0..1. Labels are int64 ids; `classes` (W,) lists the ids
    in the order of the logits, and is a tensor so that the number of ways stays free in the exported graph.
    """

    name: ClassVar[str]
    Config: ClassVar[type[LearnerConfig]] = LearnerConfig
    norms: ClassVar[tuple[Norm, ...]] = ("running", "support", "batch", "group")
    """The backbone's normalisations that it works with; the first is the default."""
    coupled: ClassVar[tuple[Norm, ...]] = ()
    """Norms under which `meta_loss` of a batch is not the mean over its episodes, one by one: the batch is then never
    split into parts or over ranks."""
    prefers: ClassVar[Sequence[str]] = ("last",)
    """The kinds of features of a pretrained backbone to choose among where a recipe says `features = "auto"`."""
    batched: ClassVar[bool] = True
    """Whether its methods run under `torch.func.vmap`; if not, the episodes of a batch take turns."""
    transductive = False
    """Whether it is being evaluated with queries normalised by their own batch, so that `adapt` need not measure the
    support set's statistics."""

    def __init__(self, backbone: Backbone, config: LearnerConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config

    @abstractmethod
    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        """Learn from a support set: (S, C, H, W) float, (S,) int64, the ids of the classes (W,) int64."""

    @abstractmethod
    def classify(self, state: State, query: Tensor) -> Tensor:
        """Logits (Q, W) for query (Q, C, H, W), each row independent of the others.

        A learner sees the query through `embed` only, which also lets features (Q, D) pass.
        """

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """The loss of the outer loop over a batch of episodes: a scalar, by default the queries' cross-entropy."""
        first = episodes[0]  # labels are the same in every episode of a batch

        def loss(support: Tensor, query: Tensor, source: Tensor) -> Tensor:
            return self.query_loss(replace(first, support=support, query=query, source=source))

        parts = episodes.support, episodes.query, episodes.source
        return over_episodes(loss, *parts, together=self.together(episodes.support)).mean()

    def query_loss(self, episode: Episode) -> Tensor:
        """Cross-entropy of one episode's queries after adapting to its support set: a scalar."""
        state = self.adapt(episode.support, episode.support_labels, episode.classes)
        if self.backbone.norm == "batch":
            state = without_statistics(state)
        targets = one_hot(episode.query_labels, episode.classes)
        return cross_entropy(self.classify(state, episode.query), targets)

    def together(self, images: Tensor) -> bool:
        """Whether the backbone runs on the images (E, ...) of a batch of episodes under `torch.func.vmap`.

        On a CPU a loop is faster and holds the graph of one episode. Running averages cannot be kept under vmap.
        """
        averages = self.backbone.norm == "running" and self.backbone.training
        return self.batched and images.device.type != "cpu" and not averages

    def stepped(self) -> None:
        """Called after each outer step, which may take several calls of `meta_loss`, for learners that count steps."""

    @property
    def stage(self) -> int:
        """The stage of training, for learners whose `meta_loss` is another one after some outer steps."""
        return 0

    def prepare(self, classes: Sequence[int]) -> None:
        """Called before meta-training, to make what only training needs, such as a head over all base classes.

        `classes` counts them: a number for each data set that the training split joins (most often one).
        """

    @property
    def surrogate(self) -> bool:
        """Whether the gradient of `meta_loss` is the outer update's direction, but not the slope of a loss.

        True of first-order approximations, of Reptile, and of the two sides of an adversarial game. The conformance
        kit then does not compare that gradient with finite differences.
        """
        return False

    @property
    def takes_features(self) -> bool:
        """Whether `adapt` and `classify` take features (N, D) in the place of images, each image's by itself."""
        return False

    def embed(self, images: Tensor, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Features (N, D) of images (N, C, H, W); features (N, D) are returned as they are.

        Weights and support statistics that `state` holds take the place of the backbone's own.
        """
        if images.dim() == 2:
            return images
        held = {
            name.removeprefix(prefix): value
            for name, value in (state or {}).items()
            for prefix in _PREFIXES
            if name.startswith(prefix)
        }
        return functional_call(self.backbone, held, (images,)) if held else self.backbone(images)

    def measure(self, images: Tensor, state: Mapping[str, Tensor] | None = None) -> tuple[Tensor, State]:
        """Features (N, D) of a support set, and its statistics as state entries; none unless the norm needs them."""
        if images.dim() == 2:
            return images, {}
        with recorded(self.backbone) as statistics:
            features = self.embed(images, state)
        if self.backbone.mirrors:
            features = (features + self.embed(images.flip(-1), state)) / 2
        return features, {_STATISTICS + name: value for name, value in statistics.items()}

    def embed_episodes(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Features of the support sets (E, S, D) and of the queries (E, Q, D) of a batch of episodes.

        One pass of the backbone over all images where each image's features are its own; batch statistics are then of
        all of them.
        """
        if self.backbone.norm in BY_ITSELF:
            images = torch.cat([episodes.support, episodes.query], 1)  # (E, S + Q, ...)
            features = self.embed(images.flatten(0, 1)).unflatten(0, images.shape[:2])
            return features[:, : episodes.support.shape[1]], features[:, episodes.support.shape[1] :]

        def embed(support: Tensor, query: Tensor) -> State:
            features, statistics = self.measure(support)
            given = None if self.backbone.norm == "batch" else statistics
            return {"support": features, "query": self.embed(query, given)}

        made = over_episodes(embed, episodes.support, episodes.query, together=self.together(episodes.support))
        return made["support"], made["query"]

    def weights(self) -> State:
        """The backbone's parameters as state entries: what an inner loop changes."""
        return {_WEIGHTS + name: parameter for name, parameter in self.backbone.named_parameters()}


class FeatureLearner(Learner):
    """A head on features: `fit` makes a state from a support set's features, `logits` classifies with it.

    If the features of an image do not depend on other images (norm `running` or `group`), they are computed once and
    cached: in evaluation, in training on a frozen backbone, and at the server, which stores those of support photos.
    """

    coupled: ClassVar[tuple[Norm, ...]] = ("running",)  # batch statistics are of all episodes in one pass

    @abstractmethod
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state for support features (S, D), labels (S,) and class ids (W,)."""

    @abstractmethod
    def logits(self, state: State, features: Tensor) -> Tensor:
        """Logits (Q, W) of query features (Q, D), each row independent of the others."""

    def evidence(self, state: State, features: Tensor) -> State:
        """Other scores (Q,) by name that a query belongs to any class: `ratio`, a log-likelihood ratio, or `nearest`.

        Calibration compares them with the largest logit and with the softmax, and takes what tells unknown best.
        """
        return {}

    def learn_statistics(self, base: Iterable[Tensor]) -> None:
        """Closed-form training: set buffers from the features (N, D) of each base class, by the settings in `config`.

        `base` gives the classes one by one, and may be iterated again.
        """

    def choices(self) -> Sequence[Mapping[str, Any]]:
        """Values of settings that the config leaves open, to choose from on validation episodes; the default first."""
        return [{}]

    @property
    def takes_features(self) -> bool:
        return self.backbone.norm in BY_ITSELF

    @property
    def closed_form(self) -> bool:
        """Whether it learns statistics of the base classes."""
        return type(self).learn_statistics is not FeatureLearner.learn_statistics

    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        features, statistics = self.measure(support)
        return {**self.fit(features, labels, classes), **statistics}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self.logits(state, self.embed(query, state))

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """The mean of `episode_loss` over a batch of episodes."""
        first = episodes[0]  # labels are the same in every episode of a batch

        def loss(support: Tensor, query: Tensor) -> Tensor:
            return self.episode_loss(support, first.support_labels, query, first.query_labels, first.classes)

        support, query = self.embed_episodes(episodes)
        return over_episodes(loss, support, query, together=self.batched).mean()

    def episode_loss(
        self, support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, classes: Tensor
    ) -> Tensor:
        """The loss of one episode from features (S, D) and (Q, D): a scalar, by default the queries' cross-entropy."""
        logits = self.logits(self.fit(support, support_labels, classes), query)
        return cross_entropy(logits, one_hot(query_labels, classes))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Statistics have the sizes of what they were learned from."""
        for name, buffer in self.named_buffers(recurse=False):
            held = state_dict.get(prefix + name)
            if isinstance(held, Tensor) and held.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(held.shape, dtype=held.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)


class InnerLoop(Learner):
    """A learner that adapts in steps: `adapt` is `begin`, then `first`, then `step` for each step more, then `finish`.

    The exporter traces `begin` and one `step`, and wraps the step in an ONNX Loop: the number of steps stays free.
    Gradients come from `kshot.gradient` only.
    """

    @property
    @abstractmethod
    def steps(self) -> int:
        """The default number of inner steps: while meta-training, and afterwards (`self.training`)."""

    @property
    def steps_by_shots(self) -> Mapping[int, int]:
        """Inner steps for numbers of images of each class, where they were chosen; `steps` goes for all without any."""
        return {}

    @property
    def most_steps(self) -> int:
        """Up to how many inner steps to try on validation episodes, to choose them by shots; 0 if settings fix them.

        The choice becomes the setting `eval_steps`.
        """
        return 0

    def steps_for(self, shots: float) -> int:
        """Inner steps for so many images of each class, on average."""
        return nearest_shots(self.steps_by_shots, shots, self.steps)

    @abstractmethod
    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        """The state after one more step, with the same names and shapes; `i` is the step's number, int64 ()."""

    @property
    def closed_form_start(self) -> bool:
        """Whether `first` takes the first step with less work than `step`."""
        return False

    def first(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state after the first step, the same that `step` gives with i = 0."""
        return self.step(state, support, labels, classes, torch.zeros((), dtype=torch.int64, device=support.device))

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state that `classify` takes; by default the last step's."""
        return state

    def adapt(
        self, support: Tensor, labels: Tensor, classes: Tensor, steps: int | None = None, *, finish: bool = True
    ) -> State:
        """Learn from a support set in `steps` steps, by default as many as `steps_for` says.

        Without `finish`, the state is the last step's: enough for queries that bring their own statistics.
        """
        steps = self.steps_for(labels.shape[0] / classes.shape[0]) if steps is None else steps
        [last] = deque(self.states(support, labels, classes, steps), maxlen=1)
        return self.finish(last, support, labels, classes) if finish else last

    def states(self, support: Tensor, labels: Tensor, classes: Tensor, steps: int) -> Iterator[State]:
        """The state before the first of so many steps, and the state after each."""
        state, given = self.begin(support, labels, classes), (support, labels, classes)
        yield state
        for number, i in enumerate(torch.arange(steps, device=support.device)):
            state = self.first(state, *given) if number == 0 else self.step(state, *given, i)
            yield state


class FeatureLoop(InnerLoop, FeatureLearner):
    """A head on features that is fitted in steps, say by gradient descent: `start`, then `update` for each step."""

    @abstractmethod
    def start(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state before the first step, for support features (S, D), labels (S,) and class ids (W,)."""

    @abstractmethod
    def update(self, state: State, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state after one more step, with the same names and shapes."""

    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        state = self.start(features, labels, classes)
        for _ in range(self.steps_for(labels.shape[0] / classes.shape[0])):
            state = self.update(state, features, labels, classes)
        return state

    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        features, statistics = self.measure(support)  # carried along, so that the backbone runs once
        return {"features": features, **self.start(features, labels, classes), **statistics}

    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        return {**state, **self.update(state, state["features"], labels, classes)}

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {name: value for name, value in state.items() if name != "features"}


Made = TypeVar("Made", Tensor, State)


def over_episodes(function: Callable[..., Made], *parts: Tensor, together: bool) -> Made:
    """A function of each episode's parts, for parts (E, ...) of E episodes: its results stacked.

    `together` calls it once, under `torch.func.vmap`; otherwise episodes take turns.
    """
    if together:
        return vmap(function, randomness="different")(*parts)
    made = [function(*episode) for episode in zip(*parts, strict=True)]
    if isinstance(made[0], Tensor):
        return torch.stack(made)
    return {name: torch.stack([one[name] for one in made]) for name in made[0]}


def without_statistics(state: State) -> State:
    """The state without its support statistics: queries are then normalised by their own batch, as papers often do.

    An answer then depends on the other queries, so this is for comparing with published figures, never for serving.
    """
    return {name: value for name, value in state.items() if not name.startswith(_STATISTICS)}
