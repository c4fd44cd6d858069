"""The inner gradient: partial, of both orders, and the same in a loop as under vmap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kshot import gradient, value_and_gradient
from kshot.data.episodes import Shape, sample_episodes
from kshot.learner import Learner
from kshot.testing import Subject, toy_images

LEARNERS = [("maml", {"steps": 2}), ("maml", {"steps": 2, "first_order": True}), ("metasgd", {}), ("anil", {})]


def product(fast: dict[str, Tensor]) -> Tensor:
    return (fast["a"] * fast["b"]).sum()


@pytest.mark.parametrize("at_once", [False, True], ids=["loop", "vmap"])
def test_the_gradient_is_partial_though_one_entry_was_computed_from_another(at_once):
    """d(ab)/da is b, not b + a db/da: for b = a², 9 and not 27 at a = 3. Its own derivative, that of b, is 2a = 6."""
    a = torch.tensor([3.0], requires_grad=True)

    def slope(weight: Tensor) -> Tensor:
        fast = {"a": weight, "b": weight**2}
        return gradient(product, fast)["a"]

    found = torch.func.vmap(lambda _: slope(a))(torch.zeros(1))[0] if at_once else slope(a)
    assert found.item() == 9
    assert torch.autograd.grad(found, a)[0].item() == 6


def test_a_state_that_is_handed_on_unchanged_does_not_carry_what_was_computed_from_it():
    """Two steps of which the first moves only b: as if a and b had never met."""
    a = torch.tensor([3.0], requires_grad=True)
    state = {"a": a, "b": torch.tensor([1.0])}
    state |= {"b": state["b"] - 0.5 * gradient(product, state)["b"]}  # 1 - a / 2 = -1/2
    state = {name: value - gradient(product, state)[name] for name, value in state.items()}
    assert state["a"].item() == 3 + 0.5
    assert torch.autograd.grad(state["a"], a)[0].item() == 1 + 0.5


@pytest.mark.parametrize("first_order", [False, True])
def test_a_value_and_gradient_under_vmap_can_be_differentiated_again_unless_told_first_order(first_order):
    x = torch.tensor([3.0], requires_grad=True)

    def one(_: Tensor) -> tuple[Tensor, Tensor]:
        value, slopes = value_and_gradient(lambda fast: (fast["x"] ** 3).sum(), {"x": x}, first_order=first_order)
        return value, slopes["x"]

    value, slope = torch.func.vmap(one)(torch.zeros(2))
    assert (value.tolist(), slope.tolist()) == ([27, 27], [[27], [27]])
    assert value.requires_grad == slope.requires_grad == (not first_order)
    if not first_order:
        assert torch.autograd.grad(slope[0], x)[0].item() == 18


def meta_gradient(learner: Learner, norm: str) -> tuple[Tensor, list[Tensor]]:
    episodes = sample_episodes(toy_images(), Shape(3, 2, 2), 3, seed=5, step=0).to("cpu", torch.float64)
    loss = learner.meta_loss(episodes)
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in learner.parameters() if p.requires_grad]))


@pytest.mark.parametrize("norm", ["support", "batch", "group"])
@pytest.mark.parametrize(("name", "options"), LEARNERS, ids=str)
def test_the_loss_and_meta_gradient_of_episodes_together_are_those_of_episodes_in_turns(
    tmp_path, monkeypatch, name, options, norm
):
    """As on a GPU, beside a loop, which `test_learners.py` holds against the plain definition."""
    learner = Subject(name, tmp_path, options, norm).build().double().train()
    expected, slopes = meta_gradient(learner, norm)
    monkeypatch.setattr(Learner, "together", lambda self, images: True)
    found, together = meta_gradient(learner, norm)
    torch.testing.assert_close(found, expected)
    for one, other in zip(together, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
