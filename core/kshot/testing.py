"""The conformance kit: promises that every learner keeps, ours or yours, each a check that runs on a toy problem.

A check's docstring says the promise, and what to do where it is broken; `kshot plugin check NAME` shows both. It
returns why the learner is exempt, where it is.
With pytest, for every installed learner:

    from kshot.testing import CHECKS, Subject

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_learner_keeps_the_contract(check, tmp_path):
        check(Subject("my-learner", folder=tmp_path))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from kshot import plugins
from kshot.backbones import Backbone, BackboneConfig
from kshot.data.datasets import ClassImages
from kshot.data.embeddings import ClassFeatures
from kshot.data.episodes import Episode, Shape, sample_episodes, sample_images
from kshot.evaluation.scores import Score, evaluate
from kshot.evaluation.statistics import interval
from kshot.learner import FeatureLearner, InnerLoop, Learner, over_episodes
from kshot.norms import Norm
from kshot.ops import one_hot
from kshot.recipe import Recipe
from kshot.training import Training, learner_step, meta_train
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import Plugin

SIDE = 16
GAIN = 0.05  # of accuracy, beyond the margin: most learners gain 0.2 to 0.5, and without training it is 0
Check = Callable[["Subject"], str | None]
CHECKS: list[Check] = []


@dataclass(frozen=True)
class Subject:
    """The learner under test, by name, on a small backbone; `options` are settings of the learner's Config."""

    name: str
    folder: Path  # for what a check writes
    options: dict[str, Any] = field(default_factory=dict)
    norm: Norm | None = None  # the backbone's; the learner's first choice if unset
    steps: int = 60  # outer steps of the toy training

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(
            name="conformance",
            dataset={"name": "toy"},
            backbone={"name": "conv4", "width": 8, "norm": self.norm},
            learner={"name": self.name, **self.options},
        )

    @property
    def learner(self) -> type[Learner]:
        learner: type[Learner] = plugins.find().learner(self.name).value
        return learner

    @property
    def norms(self) -> Sequence[Norm]:
        """Every norm that the learner works with, its first choice first; or only the one that was asked for."""
        return (self.norm,) if self.norm else self.learner.norms

    def build(self, seed: int = 0) -> Learner:
        """A fresh learner in eval mode, its parameters moved a little off an initial symmetry."""
        torch.manual_seed(seed)
        learner = self.recipe.build((1, SIDE, SIDE))
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return learner.eval()

    def episode(self, shape: Shape = Shape(5, 2, 3), step: int = 0) -> Episode:  # noqa: B008  (frozen)
        return sample_episodes(toy_images(), shape, 1, seed=7, step=step, stream="test")[0]


class Pixels(Backbone):
    """An image's pixels as its features: with it, a test's expected numbers can be worked out by hand."""

    def __init__(self, image: tuple[int, int, int], config: BackboneConfig = BackboneConfig()) -> None:  # noqa: B008
        super().__init__(image, config)
        self.features = math.prod(image)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def toy_images(classes: int = 30, images: int = 10, seed: int = 0, stripes: bool = False) -> ClassImages:
    """Classes that are smooth random patterns, and images that are noisy, shifted copies of their class's pattern.

    With `stripes`, random stripes are added to each image as a nuisance that training can learn to ignore.
    """
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (classes, 4, 4))
    patterns = np.kron(coarse, np.ones((SIDE // 4, SIDE // 4)))  # (classes, SIDE, SIDE)
    arrays = []
    for pattern in patterns:
        copies = [np.roll(pattern, random.integers(-1, 2, 2), (0, 1)) for _ in range(images)]
        noisy = np.stack(copies) + random.normal(0, 20, (images, SIDE, SIDE))
        if stripes:
            noisy = 0.8 * noisy + 25 + _stripes(images, random)
        arrays.append(noisy.clip(0, 255).astype(np.uint8)[:, None])  # (images, 1, SIDE, SIDE)
    return ClassImages.from_arrays(arrays)


def _stripes(images: int, random: np.random.Generator) -> np.ndarray:
    """Sine waves (images, SIDE, SIDE), three pixels long, with a random angle, phase and amplitude for each image."""
    angle, phase = random.uniform(0, np.pi, (images, 1, 1)), random.uniform(0, 2 * np.pi, (images, 1, 1))
    y, x = np.mgrid[:SIDE, :SIDE]
    waves: np.ndarray = random.uniform(20, 60, (images, 1, 1)) * np.sin(
        2.2 * (x * np.cos(angle) + y * np.sin(angle)) + phase
    )
    return waves


def _check(function: Check) -> Check:
    CHECKS.append(function)
    return function


def _under_every_norm(function: Check) -> Check:
    """The check with each norm that the learner works with; an error says which, where it was not the first."""

    @wraps(function)
    def check(subject: Subject) -> str | None:
        exempt: str | None = None
        for norm in subject.norms:
            try:
                exempt = function(replace(subject, norm=norm))
            except BaseException as error:
                if norm != subject.norms[0]:
                    error.add_note(f"with [backbone] norm = {norm!r}")
                raise
        return exempt

    return check


def _logits(learner: Learner, episode: Episode) -> Tensor:
    with torch.no_grad():
        state = learner.adapt(episode.support, episode.support_labels, episode.classes)
        return learner.classify(state, episode.query)


def _precise(subject: Subject) -> tuple[Learner, Episode]:
    """A fresh learner and an episode, both in float64, where steps amplify no rounding."""
    episode = subject.episode()
    return subject.build().double(), replace(episode, support=episode.support.double(), query=episode.query.double())


def _require_close(got: Tensor, expected: Tensor, promise: str, tolerance: float = 1e-3) -> None:
    """Equal up to float32 noise, which steps on a kinked loss amplify: relative to the logits' own scale."""
    assert got.shape == expected.shape, f"{promise}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    difference = float((got - expected).abs().max() / expected.abs().max().clamp_min(1))
    assert difference < tolerance, f"{promise}: logits differ by {difference:.2g}, allowed {tolerance:.2g}"


@_check
@_under_every_norm
def state_is_flat_and_logits_are_finite(subject: Subject) -> None:
    """`adapt` gives named float32 tensors, `classify` finite logits (queries, ways)."""
    learner, episode = subject.build(), subject.episode()
    head = isinstance(learner, FeatureLearner)
    made, answered = ("fit", "logits") if head else ("adapt", "classify")  # the author's methods
    with torch.no_grad():
        if isinstance(learner, FeatureLearner):
            state = learner.fit(learner.measure(episode.support)[0], episode.support_labels, episode.classes)
            assert isinstance(state, dict), f"fit must return a dict of tensors; it returned {_kind(state)}"
        state = learner.adapt(episode.support, episode.support_labels, episode.classes)
    assert isinstance(state, dict), f"adapt must return a dict of tensors; it returned {_kind(state)}"
    assert state, f"{made} returned an empty dict; all that {answered} needs to know of the classes goes into it"
    others = {name: _kind(value) for name, value in state.items() if not isinstance(value, Tensor)}
    assert not others, f"the state must hold tensors only, flat, by name; these are none: {others}"
    wrong = {name: value.dtype for name, value in state.items() if value.dtype != torch.float32}
    assert not wrong, f"state tensors must be float32; these are not: {wrong}"
    with torch.no_grad():
        logits = learner.classify(state, episode.query)
    assert isinstance(logits, Tensor), f"{answered} must return a tensor; it returned {_kind(logits)}"
    assert logits.shape == (15, 5), f"logits must be (queries, ways) = (15, 5); they are {tuple(logits.shape)}"
    assert logits.isfinite().all(), "logits must be finite"


@_check
@_under_every_norm
def any_ways_and_uneven_shots_fit(subject: Subject) -> None:
    """Ways from 2 up, classes with different shots, and ids that are not 0..W-1 all fit.

    The number of ways is classes.shape[0]; the images of each class are found by one_hot(labels, classes).
    """
    learner = subject.build()
    for ways in (2, 3, 11):
        episode = subject.episode(Shape(ways, 2, 2))
        keep = torch.arange(len(episode.support)) != 0  # the first class has one image, the others two
        ids = torch.arange(ways) * 3 + 4
        with torch.no_grad():
            state = learner.adapt(episode.support[keep], ids[episode.support_labels[keep]], ids)
            logits = learner.classify(state, episode.query)
        assert logits.shape == (2 * ways, ways), f"{ways} ways gave logits {tuple(logits.shape)}"
        assert logits.isfinite().all(), f"{ways} ways gave logits that are not finite"


@_check
@_under_every_norm
def adapting_leaves_the_learner_as_it_was(subject: Subject) -> None:
    """`adapt` and `classify` change nothing in the learner, and answer the same when asked again.

    Return what adapting learns in the state: nothing else may pass from `adapt` to `classify`. Draw nothing at random.
    """
    learner, episode, other = subject.build(), subject.episode(), subject.episode(step=1)
    before = copy.deepcopy(learner.state_dict())
    with torch.no_grad():
        state = learner.adapt(episode.support, episode.support_labels, episode.classes)
        first = learner.classify(state, episode.query)
    changed = [name for name, value in learner.state_dict().items() if not torch.equal(value, before[name])]
    assert not changed, f"adapting or classifying changed {', '.join(changed)}"
    assert torch.equal(first, _logits(learner, episode)), "the same episode twice gave two answers"
    with torch.no_grad():
        learner.adapt(other.support, other.support_labels, other.classes)
        later = learner.classify(state, episode.query)
    assert torch.equal(first, later), "adapting to another episode changed what an earlier state answers"


@_check
def evaluation_keeps_no_graph(subject: Subject) -> None:
    """Where gradients are off, inner gradients are taken without `create_graph`.

    A graph for second derivatives costs memory and time that only meta-training needs. Take gradients by
    `kshot.gradient`, which sees whether it is meta-training.
    """
    learner, episode = subject.build(), subject.episode()
    real: Any = torch.autograd.grad

    def grad(*arguments: Any, create_graph: bool = False, **others: Any) -> Any:
        assert not create_graph, "adapting took a gradient with create_graph=True while gradients are off"
        return real(*arguments, create_graph=create_graph, **others)

    with patch("torch.autograd.grad", grad):
        _logits(learner, episode)


@_check
@_under_every_norm
def order_of_the_support_set_does_not_matter(subject: Subject) -> None:
    """Support images in another order give the same logits.

    Bring the support set together by what has no order: sums, means, largest values, attention without positions.
    """
    learner, episode = _precise(subject)
    order = torch.randperm(len(episode.support), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        state = learner.adapt(episode.support[order], episode.support_labels[order], episode.classes)
        _require_close(learner.classify(state, episode.query), _logits(learner, episode), "another support order")


@_check
@_under_every_norm
def permuting_the_classes_permutes_the_logits(subject: Subject) -> None:
    """Column w of the logits answers for class w, in whatever order the classes are listed.

    Treat every class alike: let no number depend on its place in the list, as rows of a learned head do.
    """
    learner, episode = _precise(subject)
    order = torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        state = learner.adapt(episode.support, episode.support_labels, episode.classes[order])
        permuted = learner.classify(state, episode.query)
    _require_close(permuted, _logits(learner, episode)[:, order], "classes in another order")


@_check
@_under_every_norm
def one_query_does_not_depend_on_its_companions(subject: Subject) -> None:
    """A query alone gets the logits that it gets in a batch.

    Take means and normalise over features or over the support set, never over the queries.
    """
    learner, episode = subject.build(), subject.episode()
    together = _logits(learner, episode)
    with torch.no_grad():
        state = learner.adapt(episode.support, episode.support_labels, episode.classes)
        alone = torch.cat([learner.classify(state, episode.query[i : i + 1]) for i in range(len(episode.query))])
    _require_close(alone, together, "a query by itself")


@_check
@_under_every_norm
def a_query_is_seen_through_embed_only(subject: Subject) -> None:
    """`classify` takes a query's features as it takes the query; where `takes_features`, so does `adapt`.

    Use of a query only what `self.embed(query, state)` makes of it, which lets features pass as they are. Hand it the
    state: the statistics of the support set are in it.
    """
    learner, episode = subject.build(), subject.episode()
    support, labels, classes = episode.support, episode.support_labels, episode.classes
    with torch.no_grad():
        state = learner.adapt(support, labels, classes)
        expected = learner.classify(state, episode.query)
        features = learner.embed(episode.query, state)
        _require_close(learner.classify(state, features), expected, "a query's features in its place")
        if learner.takes_features:
            state = learner.adapt(learner.embed(support), labels, classes)
            _require_close(learner.classify(state, features), expected, "a support set's features in its place")


@_check
def episodes_of_a_batch_are_fitted_as_one_by_one(subject: Subject) -> str | None:
    """Many episodes at once, under `torch.func.vmap`, are answered as one by one: heads on features anywhere, others
    on a GPU.

    No `.item()`, no `if` on a tensor's values, nothing written in place. If one cannot be without, set
    `batched = False`: training then takes its episodes in turns.
    """
    learner = subject.build().double()
    if not learner.batched:
        return "`batched` says that its episodes take turns"
    batch = sample_episodes(toy_images(), Shape(5, 2, 3), 3, seed=5, step=0).to("cpu", torch.float64)
    labels, classes = batch[0].support_labels, batch[0].classes

    def answer(support: Tensor, query: Tensor) -> Tensor:
        return learner.classify(learner.adapt(support, labels, classes), query)

    with torch.no_grad():
        head = isinstance(learner, FeatureLearner)
        episodes = learner.embed_episodes(batch) if head else (batch.support, batch.query)
        one_by_one, together = (over_episodes(answer, *episodes, together=at_once) for at_once in (False, True))
    _require_close(together, one_by_one, "episodes under vmap")
    return None


@_check
def a_batch_may_be_split_unless_coupled(subject: Subject) -> None:
    """`coupled` lists exactly the norms under which a batch taken in parts trains otherwise than the whole batch.

    Batch statistics or a loss over all images of a batch couple its episodes; training then refuses `episodes_at_once`
    and several ranks.
    """
    pool = sample_images(toy_images(), 9, seed=1, step=0)
    batch = sample_episodes(toy_images(), Shape(5, 1, 2), 4, seed=5, step=0)
    batch = replace(batch, unlabelled=pool).to("cpu", torch.float64)
    for norm in subject.norms:
        found = []
        for at_once in (4, 1):
            learner = replace(subject, norm=norm).build()
            learner.prepare(toy_images().classes_per_data_set)
            learner.double().train()
            before = nn.utils.parameters_to_vector(learner.parameters()).detach()
            torch.manual_seed(0)  # of those that draw in `meta_loss`
            settings = Training(episodes_per_step=4, episodes_at_once=at_once)
            learner_step(learner, batch, torch.optim.SGD(learner.parameters(), 1.0), settings)
            moved = nn.utils.parameters_to_vector(learner.parameters()).detach() - before
            found.append((moved, [value.double() for value in learner.buffers()]))
        (whole, seen), (parts, seen_in_parts) = found
        same = (whole - parts).norm() <= 1e-6 * whole.norm() and all(map(torch.allclose, seen, seen_in_parts))
        expected = norm not in subject.learner.coupled
        assert same == expected, (
            f"norm = {norm!r} is {'not ' * expected}in `coupled`, and four episodes one by one train "
            f"{'as' if same else 'otherwise than'} all at once"
        )


@_check
def accuracy_without_information_is_chance(subject: Subject) -> None:
    """With shuffled support labels accuracy is chance, for an inner loop also without a step.

    Something other than the labels tells the classes apart: the order of the images, or of the queries.
    """
    learner, shape, episodes = subject.build(), Shape(5, 1, 4), 120
    shuffled, before = [], []
    generator = torch.Generator().manual_seed(3)
    for step in range(episodes):
        episode = subject.episode(shape, step)
        with torch.no_grad():
            labels = episode.support_labels[torch.randperm(5, generator=generator)]
            state = learner.adapt(episode.support, labels, episode.classes)
            shuffled.append(_accuracy(learner.classify(state, episode.query), episode))
            if isinstance(learner, InnerLoop):
                state = learner.adapt(episode.support, labels, episode.classes, steps=0)
                before.append(_accuracy(learner.classify(state, episode.query), episode))
    for what, accuracies in (("shuffled support labels", shuffled), ("no inner step", before)):
        if accuracies:
            mean, sd = float(np.mean(accuracies)), float(np.std(accuracies))
            allowed = 4 * max(sd, 0.01) / math.sqrt(episodes)
            assert abs(mean - 0.2) < allowed, f"{what}: accuracy {mean:.3f}, chance is 0.2 ± {allowed:.3f}; labels leak"


@_check
def config_round_trips(subject: Subject) -> None:
    """Settings survive JSON, and refuse unknown keys and changes."""
    cls = subject.learner.Config
    config = cls(**subject.options)
    again = cls.model_validate_json(config.model_dump_json())
    assert again == config, f"settings that went through JSON are others: {again!r}, and were {config!r}"
    refuses = cls.model_config.get("frozen") and cls.model_config.get("extra") == "forbid"
    assert refuses, "Config must be frozen and refuse unknown keys; derive it from kshot.LearnerConfig"


@_check
def meta_gradient_agrees_with_finite_differences(subject: Subject) -> str | None:
    """The gradient of `meta_loss` is what small steps measure, in float64, second order included.

    Where they differ, something on the way cuts the gradient: .item(), .detach(), no_grad(), argmax, or an inner
    gradient that `kshot.gradient` did not take. If that is on purpose, let the property `surrogate` say so. An error
    about Float and Double is of a constant: make it like the data, by x.new_zeros(...) or value.to(x.dtype).
    """
    learner = subject.build()
    if learner.surrogate:
        return "not measured: `surrogate` says that its gradient is an approximation or a game"
    batch = sample_episodes(toy_images(), Shape(3, 2, 2), 2, seed=6, step=0)
    batch = replace(batch, unlabelled=sample_images(toy_images(seed=3), 12, seed=5, step=0))
    learner.prepare(toy_images().classes_per_data_set)
    learner.double().train()
    batch = batch.to("cpu", torch.float64)
    parameters = [p for p in learner.parameters() if p.requires_grad]
    buffers = {name: value.clone() for name, value in learner.named_buffers()}

    def loss() -> Tensor:
        for name, value in learner.named_buffers():
            value.data.copy_(buffers[name])
        torch.manual_seed(11)  # a loss may draw
        return learner.meta_loss(batch)

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    moved, eps = [], 1e-7  # short enough to rarely cross a kink of a ReLU or a pooling
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * eps)
        moved.append(float(loss().detach()))
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=sign * eps)
    measured = (moved[0] - moved[1]) / (2 * eps)
    error = abs(slope - measured) / max(abs(measured), 1e-3)
    assert error < 1e-3, f"the gradient says {slope:.8f}, finite differences say {measured:.8f}"
    return None


@_check
def learns_a_toy_problem(subject: Subject) -> None:
    """A short meta-training lifts accuracy on unseen toy classes far above the untrained learner's, episode by episode.

    See whether the loss falls at all: are the logits of a sensible scale, and does the gradient reach the backbone?
    A learner in closed form is not trained: its `learn_statistics` sets buffers, not parameters, to what is finite,
    the same each time and in any order of the base classes.
    """
    learner = _untrained(subject)
    if isinstance(learner, FeatureLearner) and learner.closed_form:
        _learns_statistics(learner)
        return
    before, after = (_toy_score(one, shots=1) for one in (learner, _trained(subject)))
    gain, margin = interval(after.accuracies - before.accuracies)
    assert gain - margin > GAIN, (
        f"{subject.steps} outer steps lift accuracy from {100 * before.accuracy:.1f} % by {100 * gain:.1f} ± "
        f"{100 * margin:.1f} points; {100 * GAIN:.0f} are expected, and chance is 20 %"
    )


@_check
def more_shots_never_cost_accuracy(subject: Subject) -> None:
    """Trained at 1 shot, a learner answers 5-shot episodes of the same classes not clearly worse than 1-shot ones.

    See whether inner steps overshoot where a class has several images: features of a bounded length bound the head's
    curvature, and with it the rates at which descent is stable. Fewer steps help, or training at several shots.
    """
    learner = _trained(subject)
    one, five = (_toy_score(learner, shots=shots) for shots in (1, 5))
    gain, margin = interval(five.accuracies - one.accuracies)
    assert gain + margin >= 0, (
        f"5 shots change accuracy from {100 * one.accuracy:.1f} % at 1 shot by {100 * gain:.1f} ± "
        f"{100 * margin:.1f} points; more images of a class should not cost any"
    )


def _untrained(subject: Subject) -> Learner:
    torch.manual_seed(0)
    return subject.recipe.build((1, SIDE, SIDE))


def _trained(subject: Subject) -> Learner:
    """The learner after a short training, which is not repeated in one folder; in closed form it stays untrained."""
    learner = _untrained(subject)
    if isinstance(learner, FeatureLearner) and learner.closed_form:
        return learner
    settings = Training(
        ways=5,
        shots=1,
        queries=5,
        episodes_per_step=4,
        steps=subject.steps,
        lr=5e-3,
        validate_every=subject.steps // 2,
        validation_episodes=20,
        validation_queries=5,
    )
    train, validation, pool = (toy_images(seed=seed, stripes=True) for seed in (0, 1, 3))
    about = {"name": subject.name, "options": subject.options, "norm": subject.norm}
    for _ in meta_train(
        learner, train, validation, settings, folder=subject.folder / "toy", seed=0, recipe=about, unlabelled=pool
    ):
        pass
    return learner


def _toy_score(learner: Learner, shots: int) -> Score:
    """On unseen toy classes, the same ones for any number of shots."""
    return evaluate(learner, toy_images(seed=2, stripes=True), Shape(5, shots, 9 if shots == 1 else 5), 25, seed=0)


def _learns_statistics(learner: FeatureLearner) -> None:
    learner.config = learner.config.model_copy(update=learner.choices()[0])
    base = ClassFeatures(toy_images(stripes=True), learner.backbone).by_class
    unseen = ClassFeatures(toy_images(seed=2, stripes=True), learner.backbone)
    before, parameters = evaluate(learner, unseen, Shape(5, 5, 5), 50, seed=0), copy.deepcopy(learner.state_dict())
    episode = sample_episodes(unseen, Shape(5, 2, 3), 1, seed=7, step=0)[0]
    learned = []
    for order in (range(len(base)), reversed(range(len(base)))):
        learner.learn_statistics([base[number] for number in order])
        learned.append(copy.deepcopy(learner.state_dict()))
    for name, _ in learner.named_parameters():
        assert torch.equal(learned[0][name], parameters[name]), f"learn_statistics changed the parameter {name}"
    for name, value in learned[0].items():
        assert value.isfinite().all(), f"learn_statistics made the buffer {name} infinite, or NaN"
    again = copy.deepcopy(learner)
    again.load_state_dict(learned[0])
    _require_close(_logits(learner, episode), _logits(again, episode), "base classes in another order")
    after = evaluate(learner, unseen, Shape(5, 5, 5), 50, seed=0)
    gain, margin = interval(after.accuracies - before.accuracies)
    assert gain + margin >= 0, (
        f"statistics of the base classes change accuracy from {100 * before.accuracy:.1f} % by {100 * gain:.1f} ± "
        f"{100 * margin:.1f} points; unseen classes should not lose"
    )


@_check
def onnx_agrees_with_torch(subject: Subject) -> None:
    """It exports to ONNX, inner loops included, and the bundle answers like torch at any size."""
    from kshot.export import Facts, export  # onnx takes a second to import

    learner = subject.build()
    rule = ImageRule(size=SIDE, channels=1)
    facts = Facts(
        learner=Plugin(name=subject.name, config=learner.config.model_dump(mode="json")),
        backbone=Plugin(name="conv4", config=subject.recipe.backbone.options),
        image=rule,
    )
    report = export(
        learner, subject.folder / "bundle", facts=facts, data=toy_images(), shape=Shape(5, 1, 4), seed=0, episodes=100
    )
    found = report.manifest.parity
    assert found.agreement >= 0.999, f"ONNX and torch agree on {100 * found.agreement:.2f} % of the queries only"


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _accuracy(logits: Tensor, episode: Episode) -> float:
    """Share of queries right; equal logits share the credit, so a learner that knows nothing scores 1/ways."""
    best = logits >= logits.max(1, keepdim=True).values - 1e-6
    truth = one_hot(episode.query_labels, episode.classes)
    return float(((best * truth).sum(1) / best.sum(1)).mean())
