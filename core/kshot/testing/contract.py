"""Checks of the contract: state, sizes, no side effects, no information but the labels, settings."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor

from kshot.data.episodes import Episode, Shape
from kshot.learner import FeatureLearner, InnerLoop
from kshot.ops import one_hot
from kshot.testing.helpers import logits_of, under_every_norm
from kshot.testing.subject import Subject


@under_every_norm
def state_is_flat_and_logits_are_finite(subject: Subject) -> None:
    """`adapt` returns a flat dict of float32 tensors, and `classify` finite logits (queries, ways)."""
    learner, episode = subject.build(), subject.episode()
    fit, logits_by = ("fit", "logits") if isinstance(learner, FeatureLearner) else ("adapt", "classify")
    with torch.no_grad():
        if isinstance(learner, FeatureLearner):
            state = learner.fit(learner.measure(episode.support)[0], episode.support_labels, episode.classes)
            assert isinstance(state, dict), f"fit must return a dict of tensors; it returned {_type_of(state)}"
        state = learner.adapt(episode.support, episode.support_labels, episode.classes)
    assert isinstance(state, dict), f"adapt must return a dict of tensors; it returned {_type_of(state)}"
    assert state, f"{fit} returned an empty dict; return in it all that {logits_by} needs to know of the classes"
    others = {name: _type_of(value) for name, value in state.items() if not isinstance(value, Tensor)}
    assert not others, f"a state maps names to tensors; these entries are not tensors: {others}"
    wrong = {name: value.dtype for name, value in state.items() if value.dtype != torch.float32}
    assert not wrong, f"state tensors must be float32; these are not: {wrong}"
    with torch.no_grad():
        logits = learner.classify(state, episode.query)
    assert isinstance(logits, Tensor), f"{logits_by} must return a tensor; it returned {_type_of(logits)}"
    assert logits.shape == (15, 5), f"logits must be (queries, ways) = (15, 5); they are {tuple(logits.shape)}"
    assert logits.isfinite().all(), "logits must be finite"


@under_every_norm
def any_ways_and_uneven_shots_fit(subject: Subject) -> None:
    """Any number of ways from 2, different shots for each class, and class ids other than 0..W-1 are supported.

    The number of ways is classes.shape[0]; find the images of each class by one_hot(labels, classes).
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


@under_every_norm
def adapting_leaves_the_learner_as_it_was(subject: Subject) -> None:
    """`adapt` and `classify` do not change the learner, and give the same results when they are called again.

    Return what adapting learns in the state: nothing else may pass from `adapt` to `classify`. Use no random numbers.
    """
    learner, episode, other = subject.build(), subject.episode(), subject.episode(step=1)
    before = copy.deepcopy(learner.state_dict())
    with torch.no_grad():
        state = learner.adapt(episode.support, episode.support_labels, episode.classes)
        first = learner.classify(state, episode.query)
    changed = [name for name, value in learner.state_dict().items() if not torch.equal(value, before[name])]
    assert not changed, f"adapting or classifying changed {', '.join(changed)}"
    assert torch.equal(first, logits_of(learner, episode)), "the same episode gave other logits the second time"
    with torch.no_grad():
        learner.adapt(other.support, other.support_labels, other.classes)
        later = learner.classify(state, episode.query)
    assert torch.equal(first, later), "adapting to another episode changed the logits of an earlier state"


def accuracy_without_information_is_chance(subject: Subject) -> None:
    """Accuracy is at chance if the support labels are shuffled, and for an inner loop also before the first step.

    Something other than the labels tells the classes apart, such as the order of the support images or of the queries.
    """
    learner, shape = subject.build(), Shape(5, 1, 4)
    shuffled, before = [], []
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for step in range(12):
            episode = subject.episode(shape, step)
            labels = episode.support_labels[torch.randperm(5, generator=generator)]
            accuracies = []
            for places in range(5):  # each image has each label once, so that no luck in shuffling adds variance
                state = learner.adapt(episode.support, labels.roll(places), episode.classes)
                accuracies.append(_accuracy(learner.classify(state, episode.query), episode))
            shuffled.append(float(np.mean(accuracies)))
        if isinstance(learner, InnerLoop):
            for step in range(120):
                episode = subject.episode(shape, step)
                labels = episode.support_labels[torch.randperm(5, generator=generator)]
                state = learner.adapt(episode.support, labels, episode.classes, steps=0)
                before.append(_accuracy(learner.classify(state, episode.query), episode))
    for what, accuracies in (("shuffled support labels", shuffled), ("no inner step", before)):
        if accuracies:
            mean, sd = float(np.mean(accuracies)), float(np.std(accuracies))
            allowed = 4 * max(sd, 0.01) / math.sqrt(len(accuracies))
            assert abs(mean - 0.2) < allowed, f"{what}: accuracy {mean:.3f}, chance is 0.2 ± {allowed:.3f}; labels leak"


def config_round_trips(subject: Subject) -> None:
    """Settings survive a round trip through JSON, are frozen, and refuse unknown keys."""
    cls = subject.learner.Config
    config = cls(**subject.options)
    again = cls.model_validate_json(config.model_dump_json())
    assert again == config, f"a round trip through JSON changed the settings from {config!r} to {again!r}"
    refuses = cls.model_config.get("frozen") and cls.model_config.get("extra") == "forbid"
    assert refuses, "Config must be frozen and refuse unknown keys; derive it from kshot.LearnerConfig"


def _type_of(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _accuracy(logits: Tensor, episode: Episode) -> float:
    """Share of correct queries. Classes with equal largest logits share the credit, so constant logits score 1/ways."""
    best = logits >= logits.max(1, keepdim=True).values - 1e-6
    truth = one_hot(episode.query_labels, episode.classes)
    return float(((best * truth).sum(1) / best.sum(1)).mean())
