"""Tests of `nearest`: kshot's contract, and the algorithm's arithmetic."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kshot_nearest import Nearest

from kshot.testing import CHECKS, Pixels, Subject

torch.set_num_threads(1)  # faster for small tensors


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check: Callable[[Subject], None], tmp_path: Path) -> None:
    check(Subject("nearest", folder=tmp_path))


def test_a_query_belongs_to_the_class_that_it_points_to() -> None:
    """The features are the two pixels, so the expected logits are computed by hand."""
    settings = Nearest.Config(scale=2)
    learner = Nearest(Pixels(image=(1, 1, 2)), settings)  # images of two pixels
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(2, 1, 1, 2)
    state = learner.adapt(images, labels=torch.tensor([7, 4]), classes=torch.tensor([4, 7]))
    assert learner.classify(state, query=0.5 * images).tolist() == [[0, 2], [2, 0]]
