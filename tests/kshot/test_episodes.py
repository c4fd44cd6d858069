"""Episodes: disjoint, seeded, as large as the data allows and no larger."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kshot.datasets import ClassImages
from kshot.episodes import Shape, draw_indices, sample_episodes, sample_images
from kshot_runtime.errors import KshotError


def labelled_images(counts: list[int]) -> ClassImages:
    """One-pixel images whose two channels are their class and their number in it."""
    return ClassImages.from_arrays(
        [np.array([[c, i] for i in range(n)], np.uint8)[:, :, None, None] for c, n in enumerate(counts)]
    )


@st.composite
def sizes(draw: st.DrawFn) -> tuple[list[int], Shape, int]:
    shape = Shape(draw(st.integers(2, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    needed = shape.shots + shape.queries
    counts = draw(st.lists(st.integers(needed, needed + 9), min_size=shape.ways, max_size=40))
    return counts, shape, draw(st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(sizes(), st.integers(0, 2**31), st.integers(0, 10**6))
def test_every_episode_has_distinct_classes_and_distinct_images_of_the_right_class(drawn, seed, step):
    counts, shape, batch = drawn
    images = labelled_images(counts)
    episodes = sample_episodes(images, shape, batch, seed=seed, step=step)
    assert len(episodes) == batch
    for episode in episodes:
        assert len(set(episode.source.tolist())) == shape.ways
        support = (episode.support.flatten(1) * 255).round().int()  # (ways * shots, 2): class and number
        query = (episode.query.flatten(1) * 255).round().int()
        assert torch.equal(support[:, 0], episode.source[episode.support_labels].int())
        assert torch.equal(query[:, 0], episode.source[episode.query_labels].int())
        taken = [tuple(row) for row in torch.cat([support, query]).tolist()]
        assert len(set(taken)) == len(taken), "an image is drawn twice: support and query must be disjoint"
        assert torch.bincount(episode.support_labels).tolist() == [shape.shots] * shape.ways
        assert torch.bincount(episode.query_labels).tolist() == [shape.queries] * shape.ways


@settings(max_examples=30, deadline=None)
@given(sizes(), st.integers(0, 2**31), st.integers(0, 10**6))
def test_seed_and_step_say_it_all(drawn, seed, step):
    counts, shape, batch = drawn
    images = labelled_images(counts)
    first, again = (draw_indices(images, shape, batch, seed=seed, step=step) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])


def test_steps_seeds_and_streams_never_repeat_each_other():
    """Trap 6: workers that share a seed draw the same episodes."""
    images = labelled_images([20] * 100)
    draws = [
        draw_indices(images, Shape(5, 1, 1), 1, seed=seed, step=step, stream=stream)
        for seed in range(3)
        for step in range(30)
        for stream in ("train", "val", "test", "calibration")
    ]
    seen = {(c.tobytes(), i.tobytes()) for c, i in draws}
    assert len(seen) == len(draws)


def test_classes_and_images_are_drawn_evenly():
    images = labelled_images([10, 4, 4, 4, 4, 4, 4, 4])
    classes, samples = draw_indices(images, Shape(2, 1, 1), 8000, seed=1, step=0)
    frequency = np.bincount(classes.ravel(), minlength=8) / 16000
    np.testing.assert_allclose(frequency, 1 / 8, atol=0.01)
    of_first = samples[classes == 0]
    np.testing.assert_allclose(np.bincount(of_first.ravel(), minlength=10) / of_first.size, 0.1, atol=0.02)


def test_labels_are_shuffled_so_that_none_means_a_class():
    """Trap 11: labels in sorted class order leak."""
    images = labelled_images([5] * 10)
    classes, _ = draw_indices(images, Shape(5, 1, 1), 4000, seed=1, step=0)
    assert abs(classes[:, 0].mean() - 4.5) < 0.2
    assert abs((classes[:, 0] < classes[:, 1]).mean() - 0.5) < 0.03


def test_many_classes_and_few_ways_are_drawn_by_redrawing_repeats():
    images = labelled_images([2] * 200)
    classes, _ = draw_indices(images, Shape(10, 1, 1), 500, seed=0, step=0)
    assert all(len(set(row)) == 10 for row in classes.tolist())


def test_pixels_become_floats_in_0_to_1_laid_out_channels_last():
    images = ClassImages.from_arrays([np.full((3, 2, 4, 4), 255, np.uint8)] * 2)
    episode = sample_episodes(images, Shape(2, 1, 1), 1, seed=0, step=0)[0]
    assert float(episode.support.min()) == 1.0
    assert episode.support.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(4, 1, 1), "4 ways need as many classes; this split has 3"),
        (Shape(2, 5, 15), r"has 6 images; 5 shots \+ 15 queries need 20"),
    ],
)
def test_more_than_the_data_has_is_an_error_that_says_what_fits(shape, message):
    with pytest.raises(KshotError, match=message):
        sample_episodes(labelled_images([6, 7, 8]), shape, 1, seed=0, step=0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 0, 1), (5, 1, 0)])
def test_an_episode_needs_two_ways_a_shot_and_a_query(shape):
    with pytest.raises(KshotError, match="at least 2 ways"):
        Shape(*shape)


def test_unlabelled_images_are_different_ones_that_seed_and_step_fix():
    images = ClassImages.from_arrays([np.full((count, 1, 1, 1), count, np.uint8) for count in (2, 3, 5)])
    drawn = [sample_images(images, 4, seed=0, step=step) for step in (0, 1, 0)]
    assert drawn[0].shape == (4, 1, 1, 1)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    everything = sample_images(images, 100, seed=0, step=0)  # fewer are there: all of them, each once
    assert sorted((everything * 255).flatten().round().int().tolist()) == [2, 2, 3, 3, 3, 5, 5, 5, 5, 5]
