"""Augmentation changes images, and nothing else, in ways that a seed and a step decide."""

import dataclasses

import pytest
import torch

from kshot.data.augmentation import Augmentation, augment
from kshot.data.episodes import Episodes, Shape, sample_episodes
from kshot.testing import toy_images

EVERYTHING = Augmentation(shift=0.1, rotate=10, scale=0.1, flip=True, light=0.2)


def batch(step: int = 0) -> Episodes:
    return sample_episodes(toy_images(), Shape(5, 2, 3), 2, seed=1, step=step)


def of(images: torch.Tensor) -> Episodes:
    """One episode whose support and query are these images (N, C, H, W)."""
    return dataclasses.replace(batch(), support=images[None], query=images[None])


def test_without_settings_nothing_changes():
    episodes = batch()
    assert augment(episodes, Augmentation(), seed=1, step=0) is episodes


@pytest.mark.parametrize("setting", ["shift", "rotate", "scale", "flip", "light"])
def test_each_setting_changes_images_by_itself_and_keeps_them_images(setting):
    value = {"shift": 0.2, "rotate": 20, "scale": 0.2, "flip": True, "light": 0.3}[setting]
    before, after = batch(), augment(batch(), Augmentation(**{setting: value}), seed=1, step=0)
    assert after.support.shape == before.support.shape
    assert after.query.shape == before.query.shape
    assert not torch.allclose(after.support, before.support, atol=0.02)
    assert 0 <= after.query.min() <= after.query.max() <= 1
    assert torch.equal(after.source, before.source)


def test_seed_and_step_decide_what_is_drawn():
    again = [
        augment(batch(), EVERYTHING, seed=seed, step=step).query for seed, step in ((1, 0), (1, 0), (2, 0), (1, 1))
    ]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])
    assert not torch.equal(again[0], again[3])


def test_a_flip_mirrors_about_half_of_the_images_exactly():
    images = torch.rand(200, 1, 8, 8)
    flipped = augment(of(images), Augmentation(flip=True), seed=3, step=0).support[0]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(flipped, images, strict=True)]
    kept = [torch.allclose(a, b, atol=1e-5) for a, b in zip(flipped, images, strict=True)]
    assert sum(mirrored) + sum(kept) == 200
    assert 70 < sum(mirrored) < 130


def test_a_shift_moves_a_dot_by_no_more_than_its_share():
    images = torch.zeros(100, 1, 21, 21)
    images[:, :, 10, 10] = 1
    moved = augment(of(images), Augmentation(shift=0.2), seed=5, step=0).support[0, :, 0]  # (100, 21, 21)
    places = torch.arange(21.0)
    mass = moved.sum((1, 2))
    down, across = (moved.sum(2) @ places / mass, moved.sum(1) @ places / mass)
    for centre in (down, across):
        assert (centre - 10).abs().max() < 0.2 * 21 + 0.5
        assert (centre - 10).abs().max() > 2
