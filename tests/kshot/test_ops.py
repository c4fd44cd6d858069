"""The tensor functions of learners, against torch's own in float64, alone and under vmap."""

import pytest
import torch
from torch.func import vmap
from torch.nn import functional as F

from kshot import class_means, cross_entropy, one_hot, solve, squared_distances, unit

D, M, E = 12, 3, 4


def positive_definite(distinct: int | None = None) -> torch.Tensor:
    """(E, D, D); with so many distinct eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(E, D, D, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrices).Q
    values = torch.linspace(0.5, 20, distinct or D, dtype=torch.float64).repeat(D)[:D]
    return basis @ torch.diag(values) @ basis.transpose(1, 2)


def right_sides() -> torch.Tensor:
    """(E, D, M), of very different sizes, one of them zero."""
    rows = torch.randn(E, D, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows[1] *= 1e4
    rows[2, :, 1] = 0
    return rows


@pytest.mark.parametrize(("distinct", "steps"), [(1, 1), (3, 3), (12, 20)])
def test_conjugate_gradients_solve_exactly_in_as_many_steps_as_there_are_eigenvalues(distinct, steps):
    for a, b in zip(positive_definite(distinct), right_sides(), strict=True):
        x = solve(lambda x, a=a: a @ x, b, steps)
        torch.testing.assert_close(x, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-8 * float(b.abs().max()))


def test_solving_many_systems_under_vmap_is_solving_each():
    a, b = positive_definite(), right_sides()
    found = vmap(lambda a, b: solve(lambda x: a @ x, b, 20))(a, b)
    torch.testing.assert_close(found, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-6)


def test_columns_do_not_depend_on_each_other_and_steps_beyond_the_solution_change_nothing():
    [a, *_], [b, *_] = positive_definite(), right_sides()
    together = solve(lambda x: a @ x, b, 20)
    for column in range(M):
        torch.testing.assert_close(solve(lambda x: a @ x, b[:, column : column + 1], 20)[:, 0], together[:, column])
    torch.testing.assert_close(solve(lambda x: a @ x, b, 200), together)
    assert solve(lambda x: a @ x, b * 0, 20).abs().max() == 0


def test_the_gradient_of_a_solution_is_that_of_torchs():
    [a, *_], [b, *_] = positive_definite(), right_sides()
    grads = []
    for solved in (lambda a, b: solve(lambda x: a @ x, b, 20), torch.linalg.solve):
        leaves = [value.clone().requires_grad_() for value in (a, b)]
        solved((leaves[0] + leaves[0].t()) / 2, leaves[1]).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_in_float32_it_is_as_good_as_torchs_own():
    [a, *_], [b, *_] = positive_definite(), right_sides()
    exact, single = torch.linalg.solve(a, b), torch.linalg.solve(a.float(), b.float())
    mine = solve(lambda x: a.float() @ x, b.float(), 40)
    assert (mine - exact).abs().max() < 20 * (single - exact).abs().max() + 1e-5


def test_class_means_are_of_each_class_in_the_order_of_the_classes_and_zero_of_an_empty_one():
    features, labels = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]), torch.tensor([7, 7, 4])
    means = class_means(features, labels, torch.tensor([4, 7, 5]))
    assert torch.equal(means, torch.tensor([[9.0, 9.0], [2.0, 3.0], [0.0, 0.0]]))


def test_squared_distances_are_those_of_cdist_and_never_negative():
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(squared_distances(a, b), torch.cdist(a, b) ** 2)
    assert squared_distances(1000 + a.float(), 1000 + a.float()).min() >= 0


def test_cross_entropy_to_one_hot_targets_is_torchs_to_labels():
    logits, labels = torch.randn(6, 3), torch.tensor([5, 2, 8, 8, 2, 5])
    targets = one_hot(labels, torch.tensor([2, 5, 8]))
    torch.testing.assert_close(cross_entropy(logits, targets), F.cross_entropy(logits, (labels - 2) // 3))


def test_a_unit_row_has_length_1_and_a_row_of_zeros_stays():
    assert torch.equal(unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
