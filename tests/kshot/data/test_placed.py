"""Images placed on a device are the same images as those on the host."""

import numpy as np
import torch

from kshot.data.datasets import ClassImages
from kshot.data.episodes import Shape, sample_episodes, sample_images
from kshot.data.placed import PlacedImages
from kshot.testing import toy_images


def test_episodes_of_placed_images_are_those_of_the_host_to_the_bit():
    turned = ClassImages.joined([toy_images(4).rotated(), toy_images(7, 6, seed=1)])
    placed = PlacedImages(turned, "cpu")
    for step in range(5):
        ours, theirs = (sample_episodes(each, Shape(5, 2, 3), 3, seed=1, step=step) for each in (placed, turned))
        for name in ("support", "query", "source"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
            assert getattr(ours, name).stride() == getattr(theirs, name).stride()
        assert torch.equal(*(sample_images(each, 9, seed=1, step=step) for each in (placed, turned)))


def test_a_selection_of_placed_classes_has_their_images():
    images = toy_images(6)
    placed = PlacedImages(images, "cpu").only([2, 4]).limited(3)
    assert placed.counts.tolist() == [3, 3]
    assert np.array_equal(placed.gather(np.array([1]), np.array([2])), images.gather(np.array([4]), np.array([2])))
