"""Scores: intervals over episodes, the same episodes for everyone, nothing changed."""

import math

import numpy as np
import pytest
import torch

from kshot.data.episodes import Shape, sample_episodes
from kshot.evaluation.calibration import _balanced, calibrate, evidence, scores_of
from kshot.evaluation.open_set import open_set
from kshot.evaluation.scores import Score, answers, evaluate, evaluating
from kshot.evaluation.statistics import auroc, calibration_error, fit_temperature, interval, logistic
from kshot.evaluation.verification import similarities, verification
from kshot.learner import without_statistics
from kshot.testing import Pixels, Subject, toy_images
from kshot_plugins.protonet import ProtoNet


def score(accuracies: list[float]) -> Score:
    return Score(Shape(5, 1, 1), np.array(accuracies), np.array([0.9, 0.9]), np.array([True, False]), 0.0)


def test_interval_is_over_episodes_with_the_samples_standard_deviation():
    """Trap 38: 1.96 * sd / sqrt(n), ddof = 1."""
    s = score([0.8, 0.9, 1.0])
    assert s.accuracy == pytest.approx(0.9)
    assert s.margin == pytest.approx(1.96 * 0.1 / math.sqrt(3))


def test_calibration_error_of_a_hand_made_case():
    assert calibration_error(np.array([0.9, 0.9, 0.9, 0.9]), np.array([True, True, False, False])) == pytest.approx(0.4)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == pytest.approx(0.0)


def test_temperature_undoes_a_scaling_of_the_logits():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (4000, 5))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([generator.choice(5, p=row) for row in probabilities])
    assert fit_temperature((3 * logits).astype(np.float32), labels) == pytest.approx(3, rel=0.1)


def test_auroc_of_hand_made_cases():
    assert auroc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auroc(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 0.0
    assert auroc(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0.5
    assert auroc(np.array([1.0, 3.0]), np.array([2.0])) == 0.5


def test_two_learners_get_the_same_episodes(tmp_path):
    """Trap 40: without the same episodes there is no paired comparison."""
    drawn = []
    for name in ("protonet", "maml"):
        learner = Subject(name, tmp_path).build()
        run = answers(learner, toy_images(), Shape(3, 1, 2), 10, seed=4)
        drawn.append(torch.stack([episode.source for episode, _ in run]))
    assert torch.equal(*drawn)


def test_evaluation_changes_nothing_in_the_learner(tmp_path):
    learner = Subject("maml", tmp_path).build().train()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    assert len(list(answers(learner, toy_images(), Shape(3, 1, 2), 3, seed=4))) == 3
    assert learner.training
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


@pytest.mark.parametrize("norm", ["running", "group", "support"])
@pytest.mark.parametrize("name", ["protonet", "maml", "anil"])
def test_embedding_each_image_once_changes_no_answer(name, norm, tmp_path):
    learner = Subject(name, tmp_path, norm=norm).build()
    shape, images = Shape(3, 2, 4), toy_images()
    found = list(answers(learner, images, shape, 16, seed=1))
    assert (found[0][0].query.ndim == 2) is (name != "maml" and norm != "support")
    whole = [e for step in (0, 1) for e in sample_episodes(images, shape, 8, seed=1, step=step, stream="test")]
    for (given, logits), episode in zip(found, whole, strict=True):
        assert torch.equal(given.query_labels, episode.query_labels)
        assert torch.equal(given.source, episode.source)
        with torch.no_grad():
            state = learner.adapt(episode.support, episode.support_labels, episode.classes)
            expected = learner.classify(state, episode.query)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_each_image_is_embedded_once(tmp_path):
    learner, seen = Subject("protonet", tmp_path).build(), []
    learner.backbone.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    evaluate(learner, toy_images(), Shape(3, 1, 2), 200, seed=0)
    assert sum(seen) <= int(toy_images().counts.sum())


def test_the_number_of_episodes_is_the_one_asked_for(tmp_path):
    learner = Subject("protonet", tmp_path).build()
    assert evaluate(learner, toy_images(), Shape(3, 1, 2), 13, seed=0).episodes == 13


def test_transductive_and_inductive_figures_differ_only_where_the_norm_lets_them(tmp_path):
    """Trap 15: batch statistics of the queries are worth points, so both figures are given."""
    for norm, differ in (("support", True), ("batch", True), ("running", False), ("group", False)):
        learner = Subject("protonet", tmp_path, norm=norm).build()
        pair = [
            evaluate(learner, toy_images(), Shape(5, 1, 3), 20, seed=0, transductive=transductive).confidences
            for transductive in (False, True)
        ]
        assert np.array_equal(*pair) is not differ, norm


@pytest.mark.parametrize("norm", ["support", "batch"])
def test_an_inner_loop_measures_no_statistics_for_queries_that_are_normalised_by_their_own(norm, tmp_path):
    learner = Subject("maml", tmp_path, norm=norm).build()
    [episode] = sample_episodes(toy_images(), Shape(3, 1, 2), 1, seed=0, step=0)
    states = []
    for transductive in (True, False):
        with evaluating(learner, transductive=transductive):
            states.append(learner.adapt(episode.support, episode.support_labels, episode.classes))
    assert states[0].keys() == without_statistics(states[1]).keys() < states[1].keys()
    assert not learner.transductive


def test_calibration_finds_a_threshold_that_rejects_most_of_the_unknown():
    learner = ProtoNet(Pixels((1, 16, 16)), ProtoNet.Config())
    found = calibrate([(learner, toy_images())], Shape(5, 2, 3), 40, seed=0)
    assert found.auroc > 0.9
    assert found.false_accepts < 0.5
    assert 0 <= found.ece < 0.1


def test_a_threshold_from_some_classes_is_held_against_episodes_of_others():
    learner, shape = ProtoNet(Pixels((1, 16, 16)), ProtoNet.Config()), Shape(5, 2, 3)
    fit = calibrate([(learner, toy_images())], shape, 40, seed=0)
    found = open_set([(learner, toy_images(seed=2))], shape, fit, 40, seed=0)
    assert found.episodes == 40
    assert found.accepted == pytest.approx(fit.accepted, abs=0.1)
    assert found.false_accepts == pytest.approx(fit.false_accepts, abs=0.1)
    assert found.auroc > 0.9


def test_where_every_class_is_known_nothing_is_said_of_unknown_ones():
    learner, shape = ProtoNet(Pixels((1, 16, 16)), ProtoNet.Config()), Shape(len(toy_images()), 1, 1)
    fit = calibrate([(learner, toy_images())], Shape(5, 1, 1), 5, seed=0)
    assert open_set([(learner, toy_images())], shape, fit, 5, seed=0) is None


def test_each_operating_point_accepts_the_share_of_known_queries_that_it_says():
    learner = ProtoNet(Pixels((1, 16, 16)), ProtoNet.Config())
    found = calibrate([(learner, toy_images())], Shape(5, 2, 3), 40, seed=0)
    shares = [point.accepted for point in found.points]
    assert shares == sorted(shares, reverse=True)  # from lenient to strict
    assert [point.threshold for point in found.points] == sorted(point.threshold for point in found.points)
    let_in = [point.false_accepts for point in found.points]
    assert let_in == sorted(let_in, reverse=True)


def test_the_usual_threshold_lies_where_both_errors_are_one_share():
    """Of the known, 1 of 4 scores under 2.5; of the unknown, 1 of 4 over it."""
    point = _balanced(np.array([1.0, 3.0, 4.0, 5.0]), np.array([0.0, 0.5, 2.0, 4.5]))
    assert (point.accepted, point.false_accepts) == (0.75, 0.25)
    assert 2 < point.threshold <= 3


def test_where_scores_do_not_overlap_the_threshold_is_between_them():
    point = _balanced(np.array([5.0, 6.0, 7.0]), np.array([1.0, 2.0, 3.0]))
    assert (point.accepted, point.false_accepts, point.threshold) == (1.0, 0.0, 4.0)


def test_without_unknown_classes_the_threshold_lets_95_of_100_known_queries_pass():
    point = _balanced(np.arange(1000.0), np.empty(0))
    assert point.accepted == 0.95
    assert point.threshold == pytest.approx(49.95)
    assert math.isnan(point.false_accepts)


def test_both_errors_are_nearly_one_share_on_the_episodes_of_the_calibration():
    learner = ProtoNet(Pixels((1, 16, 16)), ProtoNet.Config())
    found = calibrate([(learner, toy_images())], Shape(5, 2, 3), 40, seed=0)
    assert 1 - found.accepted == pytest.approx(found.false_accepts, abs=0.02)


def test_scores_for_unknown_by_hand():
    """Logits ln 3 and 0: powers 3 and 1, so 3/4, and the log of their mean, ln 2; at temperature 1/2, 9 and 1."""
    answers = {"logits": np.array([[math.log(3), 0.0]]), "nearest": np.array([-2.0])}
    assert scores_of(answers) == ["logit", "probability", "energy", "nearest"]
    assert scores_of({"logits": answers["logits"]}) == ["logit", "probability", "energy"]
    for temperature, probability, energy in ((1.0, 0.75, math.log(2)), (0.5, 0.9, math.log(5))):
        found = {by: evidence(answers, by, temperature).item() for by in scores_of(answers)}
        expected = {"logit": math.log(3), "probability": probability, "energy": energy, "nearest": -2.0}
        assert found == pytest.approx(expected)


def test_a_temperature_of_classes_that_were_seen_and_of_others_is_their_geometric_mean():
    """The logits of the one are four times those of the other, so its temperature is."""

    class Loud(ProtoNet):
        def classify(self, state, query):
            return 4 * super().classify(state, query)

    quiet, loud = (kind(Pixels((1, 16, 16)), ProtoNet.Config()) for kind in (ProtoNet, Loud))
    shape, classes = Shape(5, 2, 3), toy_images()
    alone = calibrate([(quiet, classes)], shape, 20, seed=0)
    both = calibrate([(quiet, classes)], shape, 20, seed=0, seen=(loud, classes))
    assert both.temperature == pytest.approx(2 * alone.temperature, rel=1e-3)
    assert both.by == "logit"
    assert both.threshold == pytest.approx(2.5 * alone.threshold)  # the mean of the one and of four times it


def test_several_trials_share_the_episodes_and_one_trial_twice_is_that_trial():
    """Each trial plays its share of the same episodes: half of 20 twice is 10, of which every number is doubled."""
    trial = ProtoNet(Pixels((1, 16, 16)), ProtoNet.Config()), toy_images()
    once, twice = (calibrate([trial] * n, Shape(5, 2, 3), 10 * n, seed=0) for n in (1, 2))
    assert twice.episodes == 20
    assert twice.by == once.by
    assert twice.temperature == pytest.approx(once.temperature)
    assert twice.auroc == pytest.approx(once.auroc)
    assert twice.threshold == pytest.approx(once.threshold, rel=0.02)


def test_trials_may_have_learners_and_classes_of_their_own():
    """Folds: each learner answers for classes that only it has not seen. A better learner beside a blind one helps."""

    class Blind(Pixels):
        def forward(self, images):
            return 0 * super().forward(images)

    good, blind = ProtoNet(Pixels((1, 16, 16)), ProtoNet.Config()), ProtoNet(Blind((1, 16, 16)), ProtoNet.Config())
    classes, shape = toy_images(), Shape(4, 2, 2)
    parts = classes.only(range(15)), classes.only(range(15, 30))
    apart, mixed = (
        calibrate(list(zip(pair, parts, strict=True)), shape, 20, seed=0) for pair in ((good, good), (good, blind))
    )
    assert apart.auroc > 0.9 > mixed.auroc
    found = verification(list(zip((good, good), parts, strict=True)), 60, seed=0)
    assert found.pairs == 60
    assert found.auroc > 0.8


def test_a_learner_s_own_evidence_is_taken_where_it_tells_best_and_held_against_test_episodes():
    """Logits that say nothing of unknown classes, beside the distance of the nearest prototype, which does."""

    class Sees(ProtoNet):
        def logits(self, state, features):
            logits = super().logits(state, features)
            return logits - logits.logsumexp(1, keepdim=True)

        def evidence(self, state, features):
            return {"nearest": super().logits(state, features).max(1).values}

    learner, shape = Sees(Pixels((1, 16, 16)), ProtoNet.Config()), Shape(5, 2, 3)
    fit = calibrate([(learner, toy_images())], shape, 20, seed=0)
    plain = calibrate([(ProtoNet(Pixels((1, 16, 16)), ProtoNet.Config()), toy_images())], shape, 20, seed=0)
    assert fit.by == "nearest"
    assert (fit.auroc, fit.threshold) == pytest.approx((plain.auroc, plain.threshold))
    assert plain.by == "logit"
    assert open_set([(learner, toy_images(seed=2))], shape, fit, 20, seed=0).auroc > 0.9


def test_several_parts_share_the_episodes_of_an_open_set():
    learner, shape = ProtoNet(Pixels((1, 16, 16)), ProtoNet.Config()), Shape(5, 2, 3)
    fit = calibrate([(learner, toy_images())], shape, 20, seed=0)
    one, two = (open_set([(learner, toy_images(seed=2))] * n, shape, fit, 10 * n, seed=0) for n in (1, 2))
    assert (one.accepted, one.false_accepts, one.auroc) == pytest.approx((two.accepted, two.false_accepts, two.auroc))
    assert (one.episodes, two.episodes) == (10, 20)


def test_the_interval_is_one_function_of_any_values():
    assert interval(np.array([0.8, 0.9, 1.0])) == pytest.approx((0.9, 1.96 * 0.1 / math.sqrt(3)))
    mean, half = interval(np.array([0.5]))
    assert mean == 0.5
    assert math.isnan(half)


def test_a_temperature_stays_in_bounds_where_no_finite_one_is_best():
    one, labels = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1])
    assert math.exp(-7) <= fit_temperature(one, labels) < 0.02  # always right: the surer the better
    assert fit_temperature(one, 1 - labels) == pytest.approx(math.exp(7))  # always wrong
    assert fit_temperature(0 * one, labels) == 1  # nothing to learn from


def test_a_logistic_curve_of_values_that_tell_all_apart_is_steep_and_finite():
    values = np.array([-2.0, -1.0, 1.0, 2.0])
    slope, offset = logistic(values, values > 0)
    assert 3 < slope < 30
    assert offset == pytest.approx(0, abs=1e-6)


def test_a_logistic_curve_is_found_from_its_own_draws():
    generator = np.random.default_rng(0)
    values = generator.normal(3, 2, 20000)
    truth = generator.random(20000) < 1 / (1 + np.exp(-(1.5 * values - 4)))
    assert logistic(values, truth) == pytest.approx((1.5, -4), rel=0.1)


def test_a_probability_of_one_sixth_in_fifteen_bins_is_held_against_its_own_bin():
    """Bins of 0.1 and 0.2: the one is 0.1 off, the other 0.8."""
    assert calibration_error(np.array([0.1, 0.2]), np.array([False, True])) == pytest.approx((0.1 + 0.8) / 2)


def test_verification_tells_pairs_of_one_class_from_pairs_of_two():
    learner = ProtoNet(Pixels((1, 16, 16)), ProtoNet.Config())
    found = verification([(learner, toy_images())], 200, seed=0)
    assert found.pairs == 200
    assert found.slope > 0  # more alike is likelier the same
    assert found.auroc > 0.8
    assert found.accuracy > 0.7


def test_similarities_are_of_the_features_and_of_the_only_class_s_logit():
    learner = ProtoNet(Pixels((1, 1, 2)), ProtoNet.Config())
    image = torch.tensor([[[[3.0, 4.0]]]])
    others = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 0.0]]], [[[4.0, -3.0]]]])
    found = similarities(learner, torch.stack([others[1:2], image]), torch.stack([others, others]))
    assert found["distance"][1].tolist() == pytest.approx([0, -5, -(50**0.5)], abs=1e-5)
    assert found["cosine"][1].tolist() == pytest.approx([1, 0, 0], abs=1e-5)
    assert found["logit"][1].tolist() == pytest.approx([0, -25, -50], abs=1e-4)
    assert found["distance"][0].tolist() == pytest.approx([-5, 0, -5], abs=1e-5)
