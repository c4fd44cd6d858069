"""The interface of learners: adapt to a support set, then classify queries with the resulting state.

Which methods an author writes depends on the base class:

FeatureLearner   a head on features: `fit` and `logits`
FeatureLoop      a head on features that is fitted in steps: `start`, `update` and `logits`
InnerLoop        an inner loop that changes the backbone: `begin`, `step` and `classify`
Learner          anything else: `adapt` and `classify`

Training, evaluation, ONNX export, serving and the conformance kit work with any of them.
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
    """A backbone, and a way to turn a support set into a classifier. Calls do not change it.

    Images are float, (count, channels, height, width), in 0..1. Labels are int64 ids; `classes` (W,) lists the ids
    in the order of the logits, and is a tensor so that the number of ways stays free in the exported graph.
    """

    name: ClassVar[str]
    Config: ClassVar[type[LearnerConfig]] = LearnerConfig
    norms: ClassVar[tuple[Norm, ...]] = ("running", "support", "batch", "group")
    """The supported norms of the backbone; the first is the default."""
    coupled: ClassVar[tuple[Norm, ...]] = ()
    """Norms under which `meta_loss` of a batch is not the mean over its episodes, so that a batch cannot be split."""
    prefers: ClassVar[Sequence[str]] = ("last",)
    """The kinds of features of a pretrained backbone that `features = "auto"` in a recipe chooses from."""
    batched: ClassVar[bool] = True
    """Whether its methods run under `torch.func.vmap`; if not, the episodes of a batch run one by one."""
    transductive = False
    """Whether queries are now normalised by their own batch, so that `adapt` need not measure support statistics."""

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

        Uses the query through `embed` only, which returns features (Q, D) unchanged.
        """

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """The outer loss of a batch of episodes, a scalar: by default the cross-entropy of the queries."""
        first = episodes[0]  # whose labels all episodes of a batch share

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
        """Whether to run all episodes of a batch under `torch.func.vmap`, for images (E, ...), or one by one.

        On a CPU a loop is faster and keeps the graph of one episode only. Running averages cannot be updated under
        vmap.
        """
        averages = self.backbone.norm == "running" and self.backbone.training
        return self.batched and images.device.type != "cpu" and not averages

    def stepped(self) -> None:
        """Called after each outer step, which may call `meta_loss` several times, for learners that count steps."""

    @property
    def stage(self) -> int:
        """The stage of training, for learners whose `meta_loss` changes after some outer steps."""
        return 0

    def prepare(self, classes: Sequence[int]) -> None:
        """Called before meta-training, to create what only training needs, such as a head over all base classes.

        `classes` holds the number of training classes from each data set of the split, most often of one.
        """

    @property
    def surrogate(self) -> bool:
        """Whether the gradient of `meta_loss` gives the outer update but is not the exact gradient of a loss.

        True for first-order approximations, Reptile and adversarial games; the conformance kit then does not compare
        it with finite differences.
        """
        return False

    @property
    def takes_features(self) -> bool:
        """Whether `adapt` and `classify` also take features (N, D) in place of images."""
        return False

    def embed(self, images: Tensor, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Features (N, D) of images (N, C, H, W); features (N, D) are returned unchanged.

        Weights and support statistics in `state` override those of the backbone.
        """
        if images.dim() == 2:
            return images
        overrides = {
            name.removeprefix(prefix): value
            for name, value in (state or {}).items()
            for prefix in _PREFIXES
            if name.startswith(prefix)
        }
        return functional_call(self.backbone, overrides, (images,)) if overrides else self.backbone(images)

    def measure(self, images: Tensor, state: Mapping[str, Tensor] | None = None) -> tuple[Tensor, State]:
        """Features (N, D) of a support set, and its statistics as state entries, if the norm uses them."""
        if images.dim() == 2:
            return images, {}
        with recorded(self.backbone) as statistics:
            features = self.embed(images, state)
        if self.backbone.mirrors:
            features = (features + self.embed(images.flip(-1), state)) / 2
        return features, {_STATISTICS + name: value for name, value in statistics.items()}

    def embed_episodes(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Features of the support sets (E, S, D) and of the queries (E, Q, D) of a batch of episodes.

        If features do not depend on other images, the backbone runs once over all images of the batch; in training,
        norm `running` then normalises by the statistics of all of them.
        """
        if self.backbone.norm in BY_ITSELF:
            images = torch.cat([episodes.support, episodes.query], 1)  # (E, S + Q, ...)
            features = self.embed(images.flatten(0, 1)).unflatten(0, images.shape[:2])
            return features[:, : episodes.support.shape[1]], features[:, episodes.support.shape[1] :]

        def embed(support: Tensor, query: Tensor) -> State:
            features, statistics = self.measure(support)
            state = None if self.backbone.norm == "batch" else statistics
            return {"support": features, "query": self.embed(query, state)}

        found = over_episodes(embed, episodes.support, episodes.query, together=self.together(episodes.support))
        return found["support"], found["query"]

    def weights(self) -> State:
        """The backbone's parameters as state entries, for an inner loop to change."""
        return {_WEIGHTS + name: parameter for name, parameter in self.backbone.named_parameters()}


class FeatureLearner(Learner):
    """A head on features: `fit` makes a state from support features, and `logits` classifies query features with it.

    If the features of an image do not depend on other images (norm `running` or `group`), they are computed once and
    cached: in evaluation, in training on a frozen backbone, and by the server, for support photos.
    """

    coupled: ClassVar[tuple[Norm, ...]] = ("running",)  # all episodes are normalised in one pass

    @abstractmethod
    def fit(self, features: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state for support features (S, D), labels (S,) and class ids (W,)."""

    @abstractmethod
    def logits(self, state: State, features: Tensor) -> Tensor:
        """Logits (Q, W) of query features (Q, D), each row independent of the others."""

    def evidence(self, state: State, features: Tensor) -> State:
        """More scores (Q,) that a query belongs to a known class: `ratio`, a log-likelihood ratio, or `nearest`.

        Calibration compares them with those computed from the logits, and takes the one that detects unknown queries
        best.
        """
        return {}

    def learn_statistics(self, base: Iterable[Tensor]) -> None:
        """Closed-form training: set buffers from the features (N, D) of each base class.

        `base` yields one class at a time, and can be iterated more than once.
        """

    def choices(self) -> Sequence[Mapping[str, Any]]:
        """Values for the settings that the config leaves open; validation episodes decide. The default comes first."""
        return [{}]

    @property
    def takes_features(self) -> bool:
        return self.backbone.norm in BY_ITSELF

    @property
    def closed_form(self) -> bool:
        """Whether it learns statistics of the base classes instead of being trained by gradients."""
        return type(self).learn_statistics is not FeatureLearner.learn_statistics

    def adapt(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        features, statistics = self.measure(support)
        return {**self.fit(features, labels, classes), **statistics}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self.logits(state, self.embed(query, state))

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """The mean of `episode_loss` over a batch of episodes."""
        first = episodes[0]  # whose labels all episodes of a batch share

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
        """Resize buffers to the loaded ones: the sizes of statistics depend on the data they were learned from."""
        for name, buffer in self.named_buffers(recurse=False):
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor) and loaded.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(loaded.shape, dtype=loaded.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)


class InnerLoop(Learner):
    """A learner that adapts in steps: `adapt` calls `begin`, `first`, `step` for each further step, and `finish`.

    The exporter traces one `step` and runs it in an ONNX Loop, so the number of steps is an input of the graph. Compute
    gradients with `kshot.gradient` only.
    """

    @property
    @abstractmethod
    def steps(self) -> int:
        """The default number of inner steps; it may differ in training mode (`self.training`)."""

    @property
    def steps_by_shots(self) -> Mapping[int, int]:
        """Inner steps by shots, where they were chosen on validation episodes; if empty, `steps` holds for all."""
        return {}

    @property
    def most_steps(self) -> int:
        """The largest number of inner steps to try on validation episodes; 0 if the settings fix the number.

        The choice, by shots, becomes the setting `eval_steps`.
        """
        return 0

    def steps_for(self, shots: float) -> int:
        """Inner steps for a support set with `shots` images of each class, on average."""
        return nearest_shots(self.steps_by_shots, shots, self.steps)

    @abstractmethod
    def begin(self, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        """The state after one more step, with the same names and shapes; `i` is the step's number from 0, int64 ()."""

    @property
    def closed_form_start(self) -> bool:
        """Whether `first` computes the first step in closed form, at less cost than `step`."""
        return False

    def first(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state after the first step: the same as `step` with i = 0."""
        return self.step(state, support, labels, classes, torch.zeros((), dtype=torch.int64, device=support.device))

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        """The state for `classify`, from that of the last step; by default the same."""
        return state

    def adapt(
        self, support: Tensor, labels: Tensor, classes: Tensor, steps: int | None = None, *, finish: bool = True
    ) -> State:
        """Learn from a support set in `steps` inner steps, by default `steps_for` its shots.

        Without `finish` the state is that of the last step, which is enough for queries normalised by their own batch.
        """
        steps = self.steps_for(labels.shape[0] / classes.shape[0]) if steps is None else steps
        [last] = deque(self.states(support, labels, classes, steps), maxlen=1)
        return self.finish(last, support, labels, classes) if finish else last

    def states(self, support: Tensor, labels: Tensor, classes: Tensor, steps: int) -> Iterator[State]:
        """The state before the first of `steps` inner steps, and the state after each."""
        state, given = self.begin(support, labels, classes), (support, labels, classes)
        yield state
        for number, i in enumerate(torch.arange(steps, device=support.device)):
            state = self.first(state, *given) if number == 0 else self.step(state, *given, i)
            yield state


class FeatureLoop(InnerLoop, FeatureLearner):
    """A head on features that is fitted in steps, such as by gradient descent: `start`, then `update` for each step."""

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
        features, statistics = self.measure(support)  # part of the state, so that the backbone runs once
        return {"features": features, **self.start(features, labels, classes), **statistics}

    def step(self, state: State, support: Tensor, labels: Tensor, classes: Tensor, i: Tensor) -> State:
        return {**state, **self.update(state, state["features"], labels, classes)}

    def finish(self, state: State, support: Tensor, labels: Tensor, classes: Tensor) -> State:
        return {name: value for name, value in state.items() if name != "features"}


Result = TypeVar("Result", Tensor, State)


def over_episodes(function: Callable[..., Result], *parts: Tensor, together: bool) -> Result:
    """Apply a function to each of E episodes, given as parts (E, ...), and stack the results.

    `together` calls it once, under `torch.func.vmap`; otherwise once for each episode.
    """
    if together:
        return vmap(function, randomness="different")(*parts)
    results = [function(*episode) for episode in zip(*parts, strict=True)]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def without_statistics(state: State) -> State:
    """The state without support statistics: queries are then normalised by their own batch (transductive).

    Logits then depend on the other queries, so use it to compare with published figures only, never for serving.
    """
    return {name: value for name, value in state.items() if not name.startswith(_STATISTICS)}
