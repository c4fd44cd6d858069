"""Every picture can be drawn from odd input as well, and shows the numbers it was given."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from kshot.data.episodes import Shape
from kshot.evaluation.calibration import Calibration, OperatingPoint
from kshot.evaluation.open_set import OpenSet
from kshot_flows.report import pictures

RNG = np.random.default_rng(0)


def draw(figure: Figure) -> Figure:
    figure.savefig(io.BytesIO(), format="png", dpi=40)  # warnings are errors: layout, glyphs, empty bins
    return figure


def test_a_learning_curve_marks_the_step_that_was_kept() -> None:
    steps = [10, 20, 30]
    figure = draw(pictures.learning_curve(range(60), RNG.random(60), steps, [0.5, 0.7, 0.6], [0.01] * 3, chosen=20))
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert "kept: step 20" in labels


def test_a_learning_curve_may_have_no_validation_yet() -> None:
    draw(pictures.learning_curve([1], [0.5], [], [], []))


def test_the_histogram_counts_every_episode_and_states_the_interval() -> None:
    values = np.repeat([0.8, 0.9, 1.0], [25, 50, 25])
    axes = draw(pictures.episode_accuracies(values)).axes[0]
    assert sorted(int(bar.get_height()) for bar in axes.patches if bar.get_height() >= 25) == [25, 25, 50]
    assert axes.get_legend().get_texts()[0].get_text() == "mean 90.00 ± 1.39 % (95 % interval)"


@pytest.mark.parametrize("values", [[1.0], [1.0] * 10, [0.0, 1.0], RNG.random(500)])
def test_the_histogram_takes_any_accuracies(values: list[float]) -> None:
    draw(pictures.episode_accuracies(values))


def test_a_confusion_matrix_has_true_classes_as_rows() -> None:
    figure = draw(pictures.confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), ["cat", "a price in $ and $"]))
    assert figure.axes[0].images[0].get_array().tolist() == [[1, 1], [0, 1]]
    assert "2 of 3 queries right (66.7 %)" in figure.get_suptitle()


@pytest.mark.parametrize(("ways", "dimensions"), [(2, 1), (5, 64), (30, 8)])
def test_an_embedding_map_takes_any_ways_and_dimensions(ways: int, dimensions: int) -> None:
    labels = np.arange(ways)
    names = [f"class {way}" for way in labels]
    support, query = RNG.random((ways, dimensions)), RNG.random((ways, dimensions))
    draw(pictures.embedding_map(support, labels, query, labels, names))


def test_an_embedding_map_keeps_distances_of_flat_embeddings() -> None:
    support = np.array([[0.0, 0, 0], [3, 0, 0]])
    query = np.array([[0.0, 4, 0], [3, 4, 0]])
    axes = draw(pictures.embedding_map(support, [0, 1], query, [0, 1], ["a", "b"])).axes[0]
    points = np.concatenate([dots.get_offsets() for dots in axes.collections if len(dots.get_offsets())])
    gaps = np.linalg.norm(points[:, None] - points, axis=-1)
    assert sorted(np.unique(gaps.round(6))) == [0, 3, 4, 5]


def test_reliability_shows_each_bin_where_its_answers_are() -> None:
    confidences = np.array([0.95, 0.95, 0.55, 0.55])
    figure = draw(pictures.reliability(confidences, np.array([1, 1, 1, 0]), ece=0.05, bins=10))
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [0.5, 1.0]
    assert "5.0 %" in figure.get_suptitle()


def test_the_curve_of_unknown_queries_marks_the_default_threshold_on_validation_and_on_test() -> None:
    points = (OperatingPoint(0.95, -1.0, 0.6), OperatingPoint(0.5, 1.0, 0.1))
    fit = Calibration(Shape(5, 1, 5), 1.0, "logit", 0.0, 0.8, 0.2, 0.9, 0.02, 200, points)
    axes = draw(pictures.unknown(fit, OpenSet(0.75, 0.25, 0.85, 0.5, 200))).axes[0]
    assert axes.lines[1].get_xydata().tolist() == [[0.1, 0.5], [0.6, 0.95]]
    assert [stars.get_offsets().tolist() for stars in axes.collections] == [[[0.2, 0.8]], [[0.25, 0.75]]]
    assert "test, default threshold: 75 % pass, 25 % let in" in [t.get_text() for t in axes.get_legend().get_texts()]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_frames_right_answers_green_and_wrong_ones_red(channels: int) -> None:
    images = RNG.integers(0, 255, (6, channels, 8, 8), dtype=np.uint8)
    truth, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    figure = draw(pictures.episode_sheet(images[:2], [0, 1], images[2:], truth, predicted, ["cat", "dog"]))
    frames = [to_hex(axes.spines["top"].get_edgecolor()) for axes in figure.axes]
    assert frames.count(pictures._GREEN) == 3
    assert frames.count(pictures._RED) == 1
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["dog"]
    assert "3 of 4 queries right" in figure.get_suptitle()


def test_a_sheet_of_many_classes_says_how_many_it_leaves_out() -> None:
    images = RNG.integers(0, 255, (20, 1, 4, 4), dtype=np.uint8)
    labels, names = np.arange(20), [f"class {way}" for way in range(20)]
    figure = draw(pictures.episode_sheet(images, labels, images, labels, labels, names))
    assert "the first 10 of 20 classes" in figure.get_suptitle()
