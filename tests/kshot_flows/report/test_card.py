"""The report and the card say what is known, escape what others wrote, and take the verdict when it is there."""

from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kshot.data.episodes import Shape
from kshot.evaluation.calibration import Calibration, OperatingPoint
from kshot.evaluation.open_set import OpenSet
from kshot.recipe import Recipe
from kshot_flows.registry.gate import Check, GateReport
from kshot_flows.report import card
from kshot_flows.store.products import (
    Attempt,
    DataVersion,
    Exported,
    Line,
    Packed,
    Pin,
    Promotion,
    Scores,
    Trained,
)
from kshot_runtime import manifest

EVIL = '<img src=x onerror="alert(1)">|`b`'
SHAPE = Shape(5, 1, 15)
FIT = Calibration(
    SHAPE, 1.2, "logit", 0.0, 0.8, 0.2, 0.9, 0.02, 200, (OperatingPoint(0.95, -1.0, 0.6), OperatingPoint(0.5, 1.0, 0.1))
)
LINE = Line(SHAPE, 600, False, "random photos", 0.912, 0.004, 0.03, OpenSet(0.85, 0.125, 0.93, 0.3, 200))


def made(folder: Path, **changes: Any) -> tuple[Recipe, Scores, Exported]:
    """A recipe, scores and a bundle that say `changes` of the scores."""
    graphs = {name: manifest.FileFacts(size=1, sha256="0" * 64) for name in ("adapt.onnx", "classify.onnx")}
    about = manifest.Manifest(
        learner=manifest.Plugin(name="protonet"), backbone=manifest.Plugin(name="conv4"),
        image=manifest.ImageRule(size=84), norm="running", takes="images", features=64, state={}, files=graphs,
        parity=manifest.Parity(
            episodes=1, accuracy=1, torch_accuracy=1, agreement=1, logit_difference=0, step_difference=0,
            torch_step_difference=0, float64_difference=0, torch_float64_difference=0,
        ),
    )  # fmt: skip
    bundle = folder / "bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "bundle.json").write_bytes(about.to_bytes())
    np.savez(folder / "scores.npz", **{"cosine.accuracies": np.array([0.8, 0.9])})
    (folder / "scores.json").write_text("{}")
    data = DataVersion(Packed(EVIL, "a" * 64, f"from {EVIL}"), (), "b" * 32 + ".dir", False)
    attempt = Attempt(f"ridge {EVIL}", (SHAPE,), (0.9,), (0.01,), 1.0, True)
    learner = Trained(Pin("learner.pt", "c" * 64), data, "run", 0, 0, SHAPE, 0.9, 0.01, 3.0, "ridge", (attempt,))
    scores = Scores(
        (LINE,), (FIT,), None, Pin.of(folder / "scores.json"), Pin.of(folder / "scores.npz"), 0, "test", learner, data
    )
    recipe = Recipe.model_validate(
        {"name": "safe", "dataset": {"name": EVIL}, "backbone": {"name": "conv4"}, "learner": {"name": "protonet"}}
    )
    exported = Exported((Pin.of(bundle / "bundle.json"),), 1.0, 0.0, 0.25)
    return recipe, replace(scores, **changes), exported


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path))
    tags = {"mlflow.source.git.commit": "d" * 40, "kshot.git.dirty": "true", "kshot.prefect.flow_run": "flow"}
    found = SimpleNamespace(data=SimpleNamespace(tags=tags))
    run = SimpleNamespace(id="run", client=SimpleNamespace(get_run=lambda _: found))
    return lambda **changes: card.facts(*made(tmp_path, **changes), run)


class Tags(HTMLParser):
    """The tags of a page and their attributes, with all of them closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_both_errors_of_the_unknown_decision_and_the_interval_are_in_both(facts: Callable[..., dict[str, Any]]) -> None:
    known = facts()
    page = card.html(known, {}, 3)
    for text in (card.card(known), page):
        assert "91.20 ± 0.40 %" in text
        assert "of photos that show one of the classes 15.0 % are wrongly refused as unknown" in text
        assert "show none of them 12.5 % are wrongly let in (AUROC 93.0 %)" in text
        assert "cosine to class means" in text
        assert "d" * 40 + " + changes" in text
        assert "episodes only" not in text
    assert '<code>accept=0.95</code></td><td class="n">5.0 %</td><td class="n">60.0 %' in page
    assert len(card.card(known)) < 5000  # what MLflow keeps of a version's description


def test_what_others_wrote_is_text_and_the_page_is_well_formed(facts: Callable[..., dict[str, Any]]) -> None:
    page = card.html(facts(), {"episode": b"png"}, 3)
    images = [about for tag, about in Tags(page).found if tag == "img"]
    assert images == [{"src": "data:image/png;base64,cG5n", "alt": "episode"}]
    assert "&lt;img src=x onerror=" in page
    assert EVIL not in page
    assert "<img" not in card.card(facts())


def test_without_validation_classes_nothing_is_called_calibrated(facts: Callable[..., dict[str, Any]]) -> None:
    line = replace(LINE, open_set=None, episodes=100)
    known = facts(calibrations=(), lines=(line,))
    text, page = card.card(known), card.html(known, {}, 1)
    for each in (text, page):
        assert "no validation classes" in each
        assert "Measured on 100 episodes only" in each
        assert "wrongly let in" not in each
    Tags(page)


def test_the_verdict_comes_into_the_report_of_its_version_only(
    facts: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    check = Check("accuracy", False, 0.5, 0.8, f"50 % {EVIL}")
    gate = GateReport(2, 1, 600, 0.5, 0.01, None, (check,), ("has a calibration error",))
    waits = Promotion("safe", 2, "Staging", 1, "50 %")
    assert not card.add_verdict(report, waits, gate)
    report.write_text(card.html(facts(), {}, 2))
    assert "Not judged yet" in report.read_text()
    assert not card.add_verdict(report, replace(waits, version=1), gate)
    for _ in range(2):  # again after a kill
        assert card.add_verdict(report, waits, gate)
    page = report.read_text()
    assert page.count("<h2>Gate</h2>") == 1
    assert "Not passed</span>, version 2 is in staging." in page
    assert "Not judged yet" not in page
    assert EVIL not in page
    Tags(page)
    card.add_verdict(report, replace(waits, why="the champion takes other images", judged=False), None)
    assert "version 2 is in staging: the champion takes other images".lower() in report.read_text().lower()
