"""A class with a probability, none of them, or perhaps two: on logits that can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kshot_runtime.bundle import Tensors
from kshot_runtime.manifest import By, Calibration, OperatingPoint, Verification
from kshot_serve.spaces.decisions import closer, judge, nearest, operating, same, similarity, unit

POINTS = tuple(
    OperatingPoint(accepted=accepted, threshold=limit, false_accepts=passed)
    for accepted, limit, passed in ((0.99, -4.0, 0.5), (0.9, -2.0, 0.1), (0.5, -1.0, 0.0))
)
BY_LOGIT = Calibration(ways=5, shots=1, by="logit", threshold=-2.5, accepted=0.92, false_accepts=0.08, points=POINTS)
PAIRS = Verification(by="logit", slope=2.0, offset=4.0, pairs=2)


def logits(*rows: Sequence[float] | np.ndarray) -> Tensors:
    return {"logits": np.array(rows, np.float32)}


@pytest.mark.parametrize(
    ("accept", "limit", "accepted", "passed"),
    [
        (0.99, -4.0, 0.99, 0.5), (0.9, -2.0, 0.9, 0.1), (0.945, -3.0, 0.945, 0.3), (0.7, -1.5, 0.7, 0.05),
        (0.999, -4.0, 0.99, 0.5), (0.5, -1.0, 0.5, 0.0), (None, -2.5, 0.92, 0.08),
    ],
)  # fmt: skip
def test_a_chosen_share_lies_on_a_line_between_the_measured_ones_and_the_default_is_the_balance(
    accept: float | None, limit: float, accepted: float, passed: float
) -> None:
    point = operating(BY_LOGIT, None, 5, accept)
    assert point is not None
    assert (point.threshold, point.accepted, point.false_accepts) == pytest.approx((limit, accepted, passed))


def test_the_share_that_passes_the_default_is_read_from_the_measured_ones_where_the_bundle_lacks_it() -> None:
    """Seen on the page, with every bundle of `kshot run`: "no measured threshold" beside a slider that worked."""
    point = operating(BY_LOGIT.model_copy(update={"accepted": None}), None, 5, None)
    assert point is not None
    assert (point.threshold, point.accepted, point.false_accepts) == pytest.approx((-2.5, 0.9225, 0.08))


def test_without_measured_shares_the_bundle_s_one_threshold_holds_and_without_calibration_none() -> None:
    point = operating(BY_LOGIT.model_copy(update={"points": ()}), None, 5, 0.6)
    assert point is not None
    assert point.threshold == -2.5
    assert operating(None, None, 5, 0.95) is None


@pytest.mark.parametrize("by", ["energy", "ratio", "nearest"])
def test_the_threshold_is_on_the_evidence_that_the_bundle_names(by: By) -> None:
    """The energy is the log of the mean of the exponentials: 1 of two logits of 1, and 0 of two of 0."""
    outputs = logits([1, 1], [0, 0]) | {"ratio": np.array([0.6, 0.4]), "nearest": np.array([0.6, 0.4])}
    fit = Calibration(ways=2, shots=1, by=by, threshold=0.5)
    assert judge(outputs, fit, None, None).decisions == ("ambiguous", "unknown")


def test_a_ratio_tells_one_class_where_a_probability_cannot() -> None:
    outputs = logits([5], [5]) | {"ratio": np.array([1.0, -1.0])}
    by_cosine = Verification(by="cosine", slope=1.0, offset=0.0, pairs=2)
    fit, alike = Calibration(ways=2, shots=1, by="ratio", threshold=0.0), np.array([0.1, 0.1])
    assert judge(outputs, fit, by_cosine, None, alike).decisions == ("match", "unknown")
    assert operating(fit.model_copy(update={"by": "probability"}), by_cosine, 1, None) is None


def test_a_photo_under_the_threshold_is_unknown_however_sure_the_softmax_is() -> None:
    """The oldest complaint of all: gh:googlecreativelab/teachable-machine-v1#22, gh:openai/CLIP#390."""
    verdicts = judge(logits([-9, -30], [-1, -30]), BY_LOGIT, None, accept=0.9)
    assert verdicts.probabilities[0, 0] > 0.999
    assert verdicts.decisions == ("unknown", "match")


def test_a_stricter_share_makes_more_photos_unknown() -> None:
    rows = logits([-1.2, -9], [-3.5, -9])
    assert judge(rows, BY_LOGIT, None, accept=0.99).decisions == ("match", "match")
    assert judge(rows, BY_LOGIT, None, accept=0.9).decisions == ("match", "unknown")
    assert judge(rows, BY_LOGIT, None, accept=0.5).decisions == ("unknown", "unknown")


def test_two_classes_that_are_nearly_as_likely_are_ambiguous() -> None:
    shares = np.log([[0.6, 0.4], [0.7, 0.3], [0.66, 0.34]])
    verdicts = judge({"logits": shares}, None, None, accept=0.95)
    assert verdicts.decisions == ("ambiguous", "match", "ambiguous")


def test_a_class_that_is_more_likely_wrong_than_right_is_ambiguous() -> None:
    assert judge(logits(np.log([0.4, 0.15, 0.15, 0.15, 0.15])), None, None, accept=0.95).decisions == ("ambiguous",)
    shares = np.log([[0.49, 0.17, 0.17, 0.17], [0.52, 0.16, 0.16, 0.16]])
    assert judge(logits(*shares), None, None, accept=0.95).decisions == ("ambiguous", "match")


def test_the_temperature_softens_what_the_learner_says() -> None:
    warm = Calibration(ways=5, shots=1, temperature=10.0)
    assert judge(logits([3, 0]), None, None, accept=0.95).decisions == ("match",)
    assert judge(logits([3, 0]), warm, None, accept=0.95).decisions == ("ambiguous",)


def test_a_threshold_on_probabilities_looks_at_the_calibrated_ones() -> None:
    fit = Calibration(ways=2, shots=1, temperature=2.0, by="probability", threshold=0.8)
    rows = logits(*2 * np.log([[0.75, 0.25], [0.85, 0.15]]))
    assert judge(rows, fit, None, accept=0.95).decisions == ("unknown", "match")


def test_one_class_is_told_from_all_else_by_the_verification() -> None:
    """A softmax over one class is 1 whatever comes."""
    verdicts = judge(logits([-1.0], [-3.0]), None, PAIRS, accept=0.95)
    assert verdicts.decisions == ("match", "unknown")
    np.testing.assert_allclose(verdicts.probabilities[:, 0], [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))])


def test_with_one_class_the_share_to_accept_still_moves_the_threshold() -> None:
    assert judge(logits([-3.0]), BY_LOGIT, PAIRS, accept=0.99).decisions == ("match",)
    assert judge(logits([-1.5]), BY_LOGIT, PAIRS, accept=0.5).decisions == ("unknown",)
    assert judge(logits([-3.0]), BY_LOGIT, None, accept=0.9).decisions == ("unknown",)


def test_one_class_is_told_by_features_where_its_logit_says_nothing() -> None:
    """A gradient learner with one class has nothing to descend: its logits stay 0."""
    by_distance = Verification(by="distance", slope=1.0, offset=2.0, pairs=2)
    verdicts = judge(logits([0.0], [0.0]), BY_LOGIT, by_distance, accept=0.95, alike=np.array([-1.0, -3.0]))
    assert verdicts.decisions == ("match", "unknown")


def test_one_class_and_nothing_measured_is_a_match() -> None:
    assert judge(logits([-99.0]), None, None, accept=0.95).decisions == ("match",)


def test_features_are_compared_as_the_verification_was() -> None:
    a, b = np.array([[3.0, 4.0]]), np.array([[6.0, 8.0], [0.0, 0.0], [4.0, -3.0]])
    cosine = Verification(by="cosine", slope=1.0, offset=0.0, pairs=2)
    np.testing.assert_allclose(similarity(cosine, a, b), [[1, 0, 0]], atol=1e-12)
    distance = Verification(by="distance", slope=1.0, offset=0.0, pairs=2)
    np.testing.assert_allclose(similarity(distance, a, b)[0, :2], [-5, -5])
    assert same(cosine, np.array([1e9, -1e9])).tolist() == pytest.approx([1, 0])


def test_evidence_is_the_nearest_by_angle_the_nearest_first() -> None:
    support = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])
    [found] = nearest(np.array([[2.0, 0.1]]), support, 3)
    assert [i for i, _ in found] == [0, 3, 1]
    assert found[0][1] == pytest.approx(2 / np.hypot(2, 0.1))
    assert len(nearest(np.ones((1, 2)), support[:2], 3)[0]) == 2


def test_a_new_photo_is_judged_by_its_class_s_other_photos_and_only_if_there_are_some() -> None:
    def at(*degrees: float) -> np.ndarray:
        return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], 1)

    nothing, others = at()[:0], [at(85, 95), at(180)]
    assert closer(at(80), nothing, others) == [None]  # however close: it may be the new class's looks
    assert closer(at(0, 10, 80), nothing, others) == [None, None, 0]
    assert closer(at(80), at(0, 10), others) == [0]
    assert closer(at(0, 10, 50), nothing, others) == [None, None, None]  # between the two
    assert closer(at(53), at(-5, 5), others) == [None]
    assert closer(at(54), at(-5, 5), others) == [0]  # 1 - cos 36.87° is half of 1 - cos 53.13°
    assert closer(at(0, 80), nothing, []) == [None, None]


def test_no_photo_of_a_class_whose_photos_all_differ_is_called_closer_to_another() -> None:
    """Seen in review: with one class, a second photo of another was "closer" to the first, and so was its first."""
    unlike = np.eye(3)
    between = unit(np.array([[0.0, 0.6, 0.6]]))
    assert closer(unlike[:2], unlike[:0], [between]) == [None, None]  # which of the two would be the wrong one?
    assert closer(unlike[1:2], unlike[:1], [between]) == [None]
    assert closer(unlike, unlike[:0], [between]) == [None, None, None]


def test_no_queries_have_no_verdicts() -> None:
    verdicts = judge({"logits": np.empty((0, 3), np.float32)}, BY_LOGIT, PAIRS, accept=0.95)
    assert verdicts.probabilities.shape == (0, 3)
    assert verdicts.decisions == ()
