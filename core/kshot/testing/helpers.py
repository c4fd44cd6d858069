"""Helpers of the checks: repeating a check for each norm, and comparing logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps

import torch
from torch import Tensor

from kshot.data.episodes import Episode
from kshot.learner import Learner
from kshot.testing.subject import Subject

Check = Callable[[Subject], str | None]
"""A check: raises if the learner breaks a rule, and returns the reason if it is exempt, else None."""


def under_every_norm(function: Check) -> Check:
    """Run a check with each norm that the learner supports; a note on the error names a norm other than the first."""

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


def logits_of(learner: Learner, episode: Episode) -> Tensor:
    """Logits (Q, W) of an episode's queries after adapting to its support set, without gradients."""
    with torch.no_grad():
        state = learner.adapt(episode.support, episode.support_labels, episode.classes)
        return learner.classify(state, episode.query)


def in_float64(subject: Subject) -> tuple[Learner, Episode]:
    """A new learner and an episode in float64, in which inner steps do not amplify rounding visibly."""
    episode = subject.episode()
    return subject.build().double(), replace(episode, support=episode.support.double(), query=episode.query.double())


def require_close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-3) -> None:
    """Assert that logits are equal up to float32 rounding, relative to their scale; `what` begins the message.

    The tolerance is wide because gradient steps on a loss with kinks amplify rounding.
    """
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1))
    assert difference < tolerance, f"{what}: logits differ by {difference:.2g}, allowed {tolerance:.2g}"
