"""The gate's judgement, on numbers small enough to check by hand."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kshot_flows.registry.gate import EpisodeSet, Evidence, GateReport, GateSettings, MoreShots, judge
from kshot_runtime.errors import KshotError

EPISODES = EpisodeSet(data="d41d", split="test", ways=5, shots=1, queries=15, seed=7, protocol="random photos")
STRICT = GateSettings()


def evidence(accuracies: Any, **more: Any) -> Evidence:
    return Evidence(**{"episodes": EPISODES, "accuracies": accuracies, "ece": 0.05, "agreement": 1.0, **more})


def alternating(mean: float, swing: float, count: int = 100) -> np.ndarray:
    return mean + swing * np.where(np.arange(count) % 2, 1.0, -1.0)


def failed(report: GateReport) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


def test_a_first_version_is_held_to_absolute_limits_only() -> None:
    report = judge(evidence(alternating(0.9, 0.1)), None, STRICT)
    assert report.passed
    assert report.difference is None
    assert report.champion is None
    assert failed(judge(evidence(alternating(0.9, 0.1)), None, GateSettings(min_accuracy=0.95))) == ["accuracy"]


def test_a_first_version_may_not_be_worse_than_cosine_on_the_same_backbone_and_episodes() -> None:
    cosine = alternating(0.7, 0.25)
    assert judge(evidence(cosine + 0.02, cosine=cosine), None, STRICT).passed
    worse = evidence(cosine - 0.01, cosine=cosine)
    report = judge(worse, None, STRICT)
    assert failed(report) == ["not worse than cosine"]
    assert report.failures == [
        "-1.00 points against cosine on the same backbone and episodes, between -1.00 and -1.00 with 95 % confidence; "
        "at most 0 points may be lost: train for longer, evaluate more episodes, or take learner.name=cosine"
    ]
    assert judge(worse, None, GateSettings(margin=0.011)).passed
    assert judge(worse, evidence(cosine - 0.02), STRICT).passed  # there is a champion, who was measured with it


def test_a_version_that_more_photos_make_clearly_worse_does_not_pass() -> None:
    """Losses of 0.02 and 0.04 in turn are 3 points on average, with a deviation of 0.01 * sqrt(100 / 99)."""
    one, five = alternating(0.8, 0.0), alternating(0.77, 0.01)
    worse, gain = MoreShots.between(20, 1, 5, (one, five)), MoreShots.between(5, 1, 5, (five, one))
    report = judge(evidence(one, shots=(gain, worse)), None, STRICT)
    assert failed(report) == ["not worse than at fewer shots"]
    assert report.failures == [
        "-3.00 points from 1 to 5 shots, 20-way, between -3.20 and -2.80 with 95 % confidence; "
        "at most 0 points may be lost: train at both, with training.shots = [1, 5]"
    ]
    assert judge(evidence(one, shots=(gain, worse)), None, GateSettings(shots_margin=0.029)).passed
    unclear = MoreShots.between(5, 1, 5, (alternating(0.8, 0.0), alternating(0.79, 0.1)))
    assert judge(evidence(one, shots=(gain, unclear)), None, STRICT).passed


def test_a_version_that_lets_in_many_unknown_photos_passes_with_a_warning_in_words() -> None:
    usual = evidence(alternating(0.9, 0.1), accepted=0.71, false_accepts=0.5, ece=0.1)
    assert judge(usual, None, STRICT).warnings == ()
    report = judge(replace(usual, false_accepts=0.62, ece=0.12), None, STRICT)
    assert report.passed
    assert report.warnings == (
        "lets in 62 % of unknown photos where 71 % of the known pass (50 % is the bound): ask for more photos of each "
        "class, or set accept",
        "has a calibration error of 12.0 % (10 % is the bound): add classes to validate on",
    )
    assert "Mind:\n\n- lets in 62 % of unknown photos" in report.to_markdown()
    assert GateReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert judge(usual, None, GateSettings(max_unknown_let_in=0.4)).warnings[0].startswith("lets in 50 %")


def test_where_the_champion_cannot_be_measured_a_version_meets_cosine_and_says_so() -> None:
    cosine = alternating(0.7, 0.25)
    report = judge(evidence(cosine, cosine=cosine), None, STRICT, unmeasured=3)
    assert (report.champion, report.difference, report.passed) == (3, None, True)
    assert report.warnings == (
        "was not compared with version 3, which may have learned from the classes that are tested",
    )
    assert "with no champion to beat" in report.to_markdown()
    assert failed(judge(evidence(cosine - 0.01, cosine=cosine), None, STRICT, unmeasured=3)) == [
        "not worse than cosine"
    ]


def test_a_report_from_before_there_were_warnings_has_none() -> None:
    written = judge(evidence(alternating(0.9, 0.1)), None, STRICT).to_dict()
    del written["warnings"]
    assert GateReport.from_dict(written).warnings == ()


def test_the_interval_is_1_96_standard_errors_of_the_paired_difference() -> None:
    champion = evidence(alternating(0.7, 0.2), version=3)
    gain = np.where(np.arange(100) < 50, 0.02, 0.06)  # mean 0.04; sample sd 0.02 * sqrt(100 / 99)
    report = judge(evidence(champion.accuracies + gain, version=4), champion, STRICT)
    half = 1.96 * 0.02 * np.sqrt(100 / 99) / 10
    assert report.difference == pytest.approx((0.04 - half, 0.04, 0.04 + half))
    assert (report.version, report.champion) == (4, 3)
    assert report.passed


def test_pairing_finds_a_small_steady_loss_that_unpaired_means_would_hide() -> None:
    champion = evidence(alternating(0.7, 0.25))
    challenger = evidence(champion.accuracies - 0.01)
    report = judge(challenger, champion, STRICT)
    assert abs(report.accuracy - champion.accuracies.mean()) < report.margin  # within the unpaired interval
    assert failed(report) == ["not worse than the champion"]
    assert judge(challenger, champion, GateSettings(margin=0.011)).passed


def test_the_same_answers_pass_with_no_margin_at_all() -> None:
    champion = evidence(alternating(0.7, 0.25))
    assert judge(champion, champion, STRICT).passed


def test_a_gain_that_may_be_luck_does_not_pass_without_a_margin() -> None:
    champion = evidence(alternating(0.7, 0.1))
    challenger = evidence(champion.accuracies + alternating(0.01, 0.1))  # +1 point on average, all over the place
    assert failed(judge(challenger, champion, STRICT)) == ["not worse than the champion"]


@pytest.mark.parametrize(
    ("worse", "check"),
    [
        ({"agreement": 0.998}, "ONNX agreement"),
        ({"agreement": None}, "ONNX agreement"),
        ({"agreement": float("nan")}, "ONNX agreement"),
        ({"ece": 0.08}, "calibration"),
        ({"ece": float("nan")}, "calibration"),
        ({"auroc": 0.90}, "open set"),
        ({"auroc": None}, "open set"),
        ({"latency_ms": 12.0}, "latency"),
        ({"latency_ms": None}, "latency"),
    ],
)
def test_each_fault_alone_closes_the_gate(worse: dict[str, Any], check: str) -> None:
    good = {"auroc": 0.95, "latency_ms": 8.0}
    champion = evidence(alternating(0.7, 0.1), **good)
    settings = GateSettings(latency_ms=10)
    assert judge(evidence(champion.accuracies, **good), champion, settings).passed
    report = judge(evidence(champion.accuracies, **{**good, **worse}), champion, settings)
    assert failed(report) == [check]
    assert not report.passed


def test_too_few_episodes_do_not_pass() -> None:
    assert failed(judge(evidence([0.9] * 29), None, STRICT)) == ["episodes"]
    assert judge(evidence([0.9] * 30), None, STRICT).passed
    assert failed(judge(evidence([0.9]), None, STRICT)) == ["episodes"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 8}, "seed 7 against 8"),
        ({"shots": 5}, "shots 1 against 5"),
        ({"protocol": "across groups"}, "protocol random photos against across groups"),
        ({"data": "beef"}, "data d41d against beef"),
    ],
)
def test_other_episodes_are_an_error_that_names_the_difference(other: dict[str, Any], named: str) -> None:
    champion = evidence([0.9] * 50, episodes=replace(EPISODES, **other))
    with pytest.raises(KshotError, match=named):
        judge(evidence([0.9] * 50), champion, STRICT)


def test_another_number_of_episodes_is_an_error_too() -> None:
    with pytest.raises(KshotError, match="episodes 50 against 40"):
        judge(evidence([0.9] * 50), evidence([0.9] * 40), STRICT)


@pytest.mark.parametrize("accuracies", [[], [0.5, 1.2], [float("nan")], [[0.5]]])
def test_what_cannot_be_accuracies_is_refused(accuracies: Any) -> None:
    with pytest.raises(KshotError, match="numbers from 0 to 1"):
        evidence(accuracies)
    with pytest.raises(KshotError, match="numbers from 0 to 1"):
        evidence([0.5], cosine=accuracies)


def test_evidence_and_report_come_back_from_json_as_they_were() -> None:
    champion = evidence(alternating(0.7, 0.2), version=1)
    gain = MoreShots.between(5, 1, 5, (np.array([0.5, 0.6]), np.array([0.7, 0.7])))
    challenger = evidence(alternating(0.72, 0.2), version=2, ece=np.float32(0.04), cosine=[0.5] * 100, shots=(gain,))
    again = Evidence.from_dict(json.loads(json.dumps(challenger.to_dict())))
    assert again.to_dict() == challenger.to_dict()
    report = judge(again, champion, GateSettings(latency_ms=1))
    assert GateReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_report_reads_as_a_verdict_with_a_reason_for_each_check() -> None:
    champion = evidence(alternating(0.7, 0.2), version=1)
    report = judge(evidence(alternating(0.6, 0.2), version=2), champion, STRICT)
    text = report.to_markdown()
    assert text.startswith("# Version 2 did not pass the gate")
    assert "against version 1" in text
    assert "-10.00 points on the same episodes" in text
    assert report.failures == [
        "-10.00 points on the same episodes, between -10.00 and -10.00 with 95 % confidence; "
        "at most 0 points may be lost"
    ]


def test_an_unknown_setting_is_told_with_the_nearest_known_one() -> None:
    with pytest.raises(KshotError, match="unknown key 'marginn'; did you mean 'margin'"):
        GateSettings.of({"marginn": 0.1})
    assert GateSettings.of({"margin": 0.1}).margin == 0.1
