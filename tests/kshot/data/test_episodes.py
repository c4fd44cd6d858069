"""Episodes: disjoint, seeded, as large as the data allows and no larger."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kshot.data.datasets import ClassImages
from kshot.data.episodes import Shape, check_shape, draw_indices, protocols, sample_episodes, sample_images
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


def test_every_order_of_the_images_of_a_class_is_as_likely():
    images = labelled_images([4] * 2)
    _, samples = draw_indices(images, Shape(2, 1, 2), 12_000, seed=1, step=0)  # (12000, 2, 3)
    orders, counts = np.unique(samples.reshape(-1, 3), axis=0, return_counts=True)
    assert len(orders) == 4 * 3 * 2
    np.testing.assert_allclose(counts / 24_000, 1 / 24, atol=0.006)


def test_a_large_class_costs_no_more_random_numbers_than_a_small_one(monkeypatch):
    drawn = []

    class Counting(np.random.Generator):
        def integers(self, *arguments, **options):
            drawn.append(super().integers(*arguments, **options))
            return drawn[-1]

    monkeypatch.setattr(np.random, "Generator", Counting)
    images = labelled_images([6, 7, 8])
    large = ClassImages.from_arrays([np.zeros((size, 1, 1, 1), np.uint8) for size in (100_000, 300_000, 50)])
    for classes in (images, large):
        drawn.clear()
        _, samples = draw_indices(classes, Shape(3, 1, 5), 8, seed=0, step=0)
        assert sum(numbers.size for numbers in drawn) == 8 * (3 + 3 * 6)
    assert samples.max() > 100_000


def grouped_images(groups_per_class: list[list[int]]) -> ClassImages:
    """One-pixel images of three channels: their class, their number in it and their group."""
    return ClassImages.from_arrays(
        [
            np.array([[c, i, g] for i, g in enumerate(groups)], np.uint8)[:, :, None, None]
            for c, groups in enumerate(groups_per_class)
        ],
        groups_per_class=groups_per_class,
    )


def test_across_groups_support_comes_from_one_group_and_queries_from_all_others():
    groups = [[0, 1, 0, 2, 1, 0, 2], [5, 5, 5, 3, 3, 4], [0, 0, 0, 1, 1, 1, 1]]
    images = grouped_images(groups).with_protocol("across groups")
    supports, queries = set(), set()
    for step in range(40):
        [episode] = sample_episodes(images, Shape(3, 2, 3), 1, seed=0, step=step)
        support, query = ((part.flatten(1) * 255).round().int() for part in (episode.support, episode.query))
        for label, klass in enumerate(episode.source.tolist()):
            own, asked = support[episode.support_labels == label], query[episode.query_labels == label]
            assert {*own[:, 0].tolist(), *asked[:, 0].tolist()} == {klass}
            assert all(groups[c][i] == g for c, i, g in [*own.tolist(), *asked.tolist()])
            assert len(own[:, 1].unique()) == 2
            assert len(asked[:, 1].unique()) == 3
            [group] = own[:, 2].unique().tolist()
            assert group not in asked[:, 2]
            supports.add((klass, group))
            queries |= {(klass, other) for other in asked[:, 2].tolist()}
    # (1, 4) has one image only, too few for a support, and the rest of (1, 5) and (0, ...) suffice for the queries
    assert supports == {(0, 0), (0, 1), (0, 2), (1, 5), (1, 3), (2, 0), (2, 1)}
    assert queries == supports | {(1, 4)}


def test_groups_are_known_by_class_however_classes_are_joined_turned_and_split():
    first, second = grouped_images([[0, 1, 0]]), grouped_images([[1, 1], [2, 0, 2]])
    joined = ClassImages.joined([first.rotated(), second])
    assert joined.groups.klass.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5]
    assert joined.groups.start.tolist() == [0, 2, 0, 2, 0, 2, 0, 2, 0, 0, 1]
    assert joined.groups.size.tolist() == [2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2]
    assert joined.groups.order.tolist() == [0, 2, 1] * 4 + [0, 1] + [1, 0, 2]
    assert ClassImages.joined([first, ClassImages.from_arrays([np.zeros((2, 3, 1, 1), np.uint8)])]).groups is None


def test_the_protocols_are_those_that_the_groups_allow_and_the_own_comes_first():
    images = grouped_images([[0, 1, 1], [1, 0, 0]])
    assert [each.protocol for each in protocols(images, Shape(2, 1, 1))] == ["random photos", "across groups"]
    across = images.with_protocol("across groups")
    assert [each.protocol for each in protocols(across, Shape(2, 1, 1))] == ["across groups", "random photos"]
    assert [each.protocol for each in protocols(grouped_images([[0, 1, 1], [0, 0, 0]]), Shape(2, 1, 1))] == [
        "random photos"
    ]
    assert [each.protocol for each in protocols(labelled_images([3, 3]), Shape(2, 1, 1))] == ["random photos"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0, 0, 0, 0], [0, 1, 1, 1]], r"class '0' has 1 groups of 4 to 4 images; 1 shots of one and 2 queries"),
        ([[0, 1, 1, 2], [0, 1, 2, 3], [0] * 4, [1] * 4], r"'2' has 1 groups .* \(and 1 more classes are short\)"),
    ],
)
def test_classes_whose_groups_are_too_few_or_too_small_are_named(groups, message):
    with pytest.raises(KshotError, match=message):
        draw_indices(grouped_images(groups).with_protocol("across groups"), Shape(2, 1, 2), 1, seed=0, step=0)


def test_episodes_across_groups_need_groups():
    with pytest.raises(KshotError, match=r"import them again with --group-by, or set dataset.across_groups=false"):
        check_shape(labelled_images([4, 4]).with_protocol("across groups"), Shape(2, 1, 1))


def test_an_error_names_the_setting_that_mends_it():
    images, settings = labelled_images([6, 7, 8]), ("training.validation_ways={}", "training.validation_queries={}")
    with pytest.raises(KshotError, match=r"Set training.validation_ways=3, or add classes"):
        check_shape(images, Shape(5, 1, 1), settings)
    with pytest.raises(KshotError, match=r"Set training.validation_queries=5, or add images"):
        check_shape(images, Shape(3, 1, 7), settings)
    with pytest.raises(KshotError, match=r"Ask for fewer shots, or add images"):
        check_shape(images, Shape(3, 6, 1), settings)
    with pytest.raises(KshotError, match=r"this split has 1. Add classes"):
        check_shape(labelled_images([6]), Shape(2, 1, 1), settings)


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
