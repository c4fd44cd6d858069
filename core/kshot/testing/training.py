"""Checks of training: a short training raises accuracy, and more shots do not lower it."""

from __future__ import annotations

import copy

import torch

from kshot.data.embeddings import ClassFeatures
from kshot.data.episodes import Shape, sample_episodes
from kshot.evaluation.scores import Score, evaluate
from kshot.evaluation.statistics import interval
from kshot.learner import FeatureLearner, Learner
from kshot.testing.helpers import logits_of, require_close
from kshot.testing.subject import SIDE, Subject, toy_images
from kshot.training import Training, meta_train

GAIN = 0.05
"""The gain in accuracy required of a training, beyond its margin: most learners gain 0.2 to 0.5."""


def learns_a_toy_problem(subject: Subject) -> None:
    """A short meta-training clearly raises accuracy on unseen toy classes, compared on the same episodes.

    Check whether the loss falls at all: are the logits of a sensible scale, and does the gradient reach the backbone?
    A learner in closed form is not trained: its `learn_statistics` may set buffers only, to finite values that depend
    on neither chance nor the order of the base classes.
    """
    learner = _untrained(subject)
    if isinstance(learner, FeatureLearner) and learner.closed_form:
        _check_statistics(learner)
        return
    before, after = (_toy_score(one, shots=1) for one in (learner, _trained(subject)))
    gain, margin = interval(after.accuracies - before.accuracies)
    assert gain - margin > GAIN, (
        f"{subject.steps} outer steps change accuracy from {100 * before.accuracy:.1f} % by {100 * gain:.1f} ± "
        f"{100 * margin:.1f} points; a gain of {100 * GAIN:.0f} is required, and chance is 20 %"
    )


def more_shots_never_cost_accuracy(subject: Subject) -> None:
    """After training at 1 shot, accuracy at 5 shots is not clearly lower than at 1 shot, on the same classes.

    Check whether inner steps overshoot when a class has several images: features of bounded length bound the curvature
    of the loss, and so the rates at which gradient descent is stable. Fewer steps help, or training at several shots.
    """
    learner = _trained(subject)
    one, five = (_toy_score(learner, shots=shots) for shots in (1, 5))
    gain, margin = interval(five.accuracies - one.accuracies)
    assert gain + margin >= 0, (
        f"5 shots change accuracy from {100 * one.accuracy:.1f} % at 1 shot by {100 * gain:.1f} ± "
        f"{100 * margin:.1f} points; more images of a class should not lower it"
    )


def _untrained(subject: Subject) -> Learner:
    torch.manual_seed(0)
    return subject.recipe.build((1, SIDE, SIDE))


def _trained(subject: Subject) -> Learner:
    """The learner after a short training, resumed from `subject.folder` if done; untrained if it is in closed form."""
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
    """The score on unseen toy classes, the same for any number of shots."""
    return evaluate(learner, toy_images(seed=2, stripes=True), Shape(5, shots, 9 if shots == 1 else 5), 25, seed=0)


def _check_statistics(learner: FeatureLearner) -> None:
    """Check `learn_statistics`: buffers only, finite, in any order of the classes, without loss on unseen classes."""
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
        assert value.isfinite().all(), f"learn_statistics set the buffer {name} to infinity or NaN"
    again = copy.deepcopy(learner)
    again.load_state_dict(learned[0])
    require_close(logits_of(learner, episode), logits_of(again, episode), "base classes in another order")
    after = evaluate(learner, unseen, Shape(5, 5, 5), 50, seed=0)
    gain, margin = interval(after.accuracies - before.accuracies)
    assert gain + margin >= 0, (
        f"statistics of the base classes change accuracy from {100 * before.accuracy:.1f} % by {100 * gain:.1f} ± "
        f"{100 * margin:.1f} points; they should not lower it on unseen classes"
    )
