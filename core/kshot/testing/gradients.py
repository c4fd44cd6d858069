"""Checks of gradients: of the inner loop, of `meta_loss`, and of a batch that is split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from kshot.data.episodes import Shape, sample_episodes, sample_images
from kshot.testing.helpers import logits_of
from kshot.testing.subject import Subject, toy_images
from kshot.training import Training, learner_step


def evaluation_keeps_no_graph(subject: Subject) -> None:
    """While gradients are disabled, inner gradients are computed without `create_graph`.

    The graph for second derivatives costs memory and time, and only meta-training needs it. Compute inner gradients
    with `kshot.gradient`, which makes that graph only while gradients are enabled.
    """
    learner, episode = subject.build(), subject.episode()
    real: Any = torch.autograd.grad

    def grad(*arguments: Any, create_graph: bool = False, **others: Any) -> Any:
        assert not create_graph, "adapting computed a gradient with create_graph=True while gradients are disabled"
        return real(*arguments, create_graph=create_graph, **others)

    with patch("torch.autograd.grad", grad):
        logits_of(learner, episode)


def a_batch_may_be_split_unless_coupled(subject: Subject) -> None:
    """`coupled` lists exactly the norms under which splitting a batch of episodes changes the outer step.

    Batch statistics, or a loss over all images of a batch, couple its episodes; training then refuses
    `episodes_at_once` and several ranks.
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
            torch.manual_seed(0)  # `meta_loss` may use random numbers
            settings = Training(episodes_per_step=4, episodes_at_once=at_once)
            learner_step(learner, batch, torch.optim.SGD(learner.parameters(), 1.0), settings)
            change = nn.utils.parameters_to_vector(learner.parameters()).detach() - before
            found.append((change, [value.double() for value in learner.buffers()]))
        (whole, buffers), (split, buffers_split) = found
        same = (whole - split).norm() <= 1e-6 * whole.norm() and all(map(torch.allclose, buffers, buffers_split))
        expected = norm not in subject.learner.coupled
        assert same == expected, (
            f"norm = {norm!r} is {'not ' * expected}in `coupled`, but taking four episodes one by one "
            f"{'does not change' if same else 'changes'} the outer step"
        )


def meta_gradient_agrees_with_finite_differences(subject: Subject) -> str | None:
    """The gradient of `meta_loss` agrees with finite differences in float64, second-order terms included.

    If they differ, something cuts the graph: .item(), .detach(), no_grad(), argmax, or an inner gradient that
    `kshot.gradient` did not compute. If that is intended, let the property `surrogate` return True. An error about
    Float and Double comes from a constant: give it the dtype of the data, by x.new_zeros(...) or value.to(x.dtype).
    """
    learner = subject.build()
    if learner.surrogate:
        return "not measured: `surrogate` says that its gradient is an approximation or of an adversarial game"
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
        torch.manual_seed(11)  # a loss may use random numbers
        return learner.meta_loss(batch)

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    losses, eps = [], 1e-7  # short enough to rarely cross a kink of a ReLU or a pooling
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * eps)
        losses.append(float(loss().detach()))
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=sign * eps)
    measured = (losses[0] - losses[1]) / (2 * eps)
    error = abs(slope - measured) / max(abs(measured), 1e-3)
    assert error < 1e-3, f"the gradient says {slope:.8f}, finite differences say {measured:.8f}"
    return None
