"""Recipes side by side, everything real on a tiny scale: the same episodes for all, differences episode by episode."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from kshot.data.episodes import Shape
from kshot.evaluation.open_set import OpenSet
from kshot_flows import recipes
from kshot_flows.compare import entrants, shared_shapes
from kshot_flows.report import standings_view, summary
from kshot_flows.report.standings import Comparison, Cost, Draw, Measured, Standing, Standings
from kshot_flows.run import start
from kshot_flows.run.start import run as pipeline_run
from kshot_flows.tracking import stores
from kshot_runtime.errors import KshotError

DRAW = Draw(Shape(3, 1, 3))
COMMON = ("training.steps=20", "training.validation_episodes=5")


@dataclass
class Project:
    """A project in which two recipes were compared once: one of 60 episodes, one of 40 and a shape more."""

    home: Path
    asked: list[str]
    found: Comparison
    registered: set[str]  # by the comparison: models of other tests may be in the store


@pytest.fixture(scope="module")
def project(
    new_project: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory, prefect_api: str
) -> Iterator[Project]:
    home = new_project(tmp_path_factory.mktemp("compared") / "project")
    recipe = str(home / "tiny.toml")
    asked = [recipe, f"{recipe} backbone.width=4 evaluation.episodes=40 evaluation.shots=[1,2]", *COMMON]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSHOT_HOME", str(home))
        for name in ("KSHOT_DATA", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        before = models()
        found = start.compare(asked)
        yield Project(home, asked, found, models() - before)


def models() -> set[str]:
    return {model.name for model in stores.client().search_registered_models()}


def bundle(project: Project, width: int) -> Path:
    """The bundle of the recipe whose backbone is so wide."""
    [file] = [
        file for file in project.home.glob("runs/tiny/*/bundle-*/bundle.json")
        if json.loads(file.read_text())["backbone"]["config"]["width"] == width
    ]  # fmt: skip
    return file.parent


def episodes(project: Project, width: int) -> np.ndarray:
    """What each of its episodes gave, from the file of arrays that the evaluation left."""
    [file] = bundle(project, width).parent.glob("scores-*.npz")
    with np.load(file) as arrays:
        return np.asarray(arrays["3w1s.accuracies"])


def test_all_are_measured_on_the_episodes_that_they_share(project: Project) -> None:
    found = project.found.standings
    assert found.episodes == {DRAW: 40}
    assert found.data == "patterns:test"
    wide, narrow = episodes(project, 8), episodes(project, 4)
    assert (len(wide), len(narrow)) == (60, 40)
    first, second = (row.measured[DRAW] for row in found.rows)
    assert first.accuracy == wide[:40].mean()
    assert second.accuracy == narrow.mean()
    difference = narrow - wide[:40]
    assert second.difference == pytest.approx(difference.mean())
    assert second.difference_margin == pytest.approx(1.96 * difference.std(ddof=1) / np.sqrt(40))


def test_costs_are_those_of_what_is_served(project: Project) -> None:
    for row, width in zip(project.found.standings.rows, (8, 4), strict=True):
        assert row.cost.bundle_bytes == sum(file.stat().st_size for file in bundle(project, width).iterdir())
        assert row.cost.adapt_ms > 0
        assert row.cost.classify_ms > 0
        # Four convolutions 3 x 3 without biases, from one channel to `width`; each followed by a scale and a shift.
        assert row.cost.parameters == (9 + 3 * 9 * width) * width + 4 * 2 * width


def test_one_mlflow_run_has_the_table_the_picture_and_the_trainings(project: Project) -> None:
    door = stores.client()
    run = door.get_run(project.found.run)
    assert run.info.status == "FINISHED"
    assert run.data.params["1.recipe"] == "tiny"
    assert run.data.params["2.recipe"] == "tiny backbone.width=4 evaluation.episodes=40 evaluation.shots=[1,2]"
    assert len({run.data.params[f"{number}.training"] for number in (1, 2)}) == 2
    files = {artifact.path for where in ("", "pictures") for artifact in door.list_artifacts(run.info.run_id, where)}
    assert {"comparison.json", "pictures/comparison.png"} <= files
    table = json.loads((project.found.folder / "comparison.json").read_text())
    assert table == project.found.standings.to_dict()
    assert (project.found.folder / "comparison.png").stat().st_size > 10_000


def test_nothing_is_registered(project: Project) -> None:
    assert project.registered == set()


def test_a_second_comparison_trains_nothing(project: Project) -> None:
    before = {file: file.stat().st_mtime for file in project.home.glob("runs/tiny/**/*")}
    again = start.compare([project.asked[1], project.asked[0], *COMMON])  # the other way round
    assert {file: file.stat().st_mtime for file in project.home.glob("runs/tiny/**/*")} == before
    first, second = (row.measured[DRAW] for row in again.standings.rows)
    assert first.difference == 0
    assert second.difference == pytest.approx(-project.found.standings.rows[1].measured[DRAW].difference)


def test_a_run_of_the_pipeline_uses_the_training_of_a_comparison(project: Project) -> None:
    done = pipeline_run(project.asked[0], list(COMMON))
    assert [step.step for step in done if step.reused] == ["version_data", "meta_train", "evaluate", "export"]


def test_the_result_says_who_is_better_what_it_costs_and_where_the_picture_is(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    summary.show_comparison(project.found, "kshot compare a b")
    shown = capsys.readouterr().out
    second = project.found.standings.rows[1]
    measured = second.measured[DRAW]
    assert measured.open_set is not None
    shares = measured.ece, measured.open_set.accepted, measured.open_set.false_accepts, measured.open_set.auroc
    difference = f"{100 * measured.difference:+.2f} ± {100 * measured.difference_margin:.2f}".replace("-", "−")
    accuracy = f"{100 * measured.accuracy:.2f} ± {100 * measured.margin:.2f}"
    assert " ".join([accuracy, difference, *(f"{100 * share:.1f}" for share in shares)]) in " ".join(shown.split())
    assert measured.verdict in shown
    assert "adapting to 3 photos (3-way 1-shot)" in " ".join(shown.split())
    assert f"{second.cost.parameters:,}" in shown
    assert f"{project.found.folder.relative_to(project.home)}/comparison.png" in shown


def test_a_difference_is_taken_episode_by_episode() -> None:
    ours, theirs = np.array([0.9, 0.7, 0.8, 0.6]), np.array([0.8, 0.6, 0.7, 0.5])  # always 0.1 more
    measured = Measured.of(ours, theirs, 0.02, None)
    assert measured.difference == pytest.approx(0.1)
    assert measured.difference_margin == pytest.approx(0, abs=1e-9)
    assert measured.verdict == "better"
    assert Measured.of(theirs, ours, 0.02, None).verdict == "worse"
    assert measured.margin == pytest.approx(1.96 * np.std(ours, ddof=1) / 2)


def test_an_interval_that_holds_zero_is_no_difference() -> None:
    assert Measured(0.9, 0.01, 0.02, 0.03, 0.02, None).verdict == "no difference"
    assert Measured.of(np.array([0.5, 0.7]), np.array([0.5, 0.7]), 0.02, None).verdict == "no difference"


@pytest.mark.parametrize("rows", [2, 12])
@pytest.mark.parametrize("shapes", [1, 4])
@pytest.mark.parametrize("protocols", [["random photos"], ["across groups", "random photos"]])
def test_the_picture_takes_any_number_of_recipes_and_kinds_of_episode(
    rows: int, shapes: int, protocols: list[str], tmp_path: Path
) -> None:
    draws = [Draw(Shape(5 * number, 1, 5), each) for number in range(1, shapes + 1) for each in protocols]
    counts = dict.fromkeys(draws, 300)
    differences = [0, 0.2, -0.2, 0.01] * 3
    standings = Standings(
        "glyphs:test",
        counts,
        tuple(
            Standing(
                f"recipe {number} with.long.change=1000 and $", "protonet",
                {
                    draw: Measured(0.7 + differences[number], 0.02, differences[number], 0.05, 0.02,
                                   OpenSet(0.8, 0.2, 0.9, 0.5, 200) if number else None)
                    for draw in draws
                },
                Cost(10**number / 1e6, 0.5, 29_000, 200_000),
            )
            for number in range(rows)
        ),
        25,
    )  # fmt: skip
    figure = standings_view.picture(standings)
    figure.savefig(tmp_path / "picture.png", dpi=40)  # warnings are errors
    accuracies, trust, costs = (part.axes for part in figure.subfigs)
    assert (len(accuracies), len(trust), len(costs)) == (len(draws), len(draws), 4)
    assert len(trust[0].lines) == 3 * (rows - 1)  # unknown photos were tried with all but the first
    titles = [axes.get_title().replace("\n", ", ") for axes in accuracies]
    assert titles[0] == "accuracy, 5-way 1-shot" + (", across groups" if len(protocols) == 2 else "")
    assert len(set(titles)) == len(draws)
    colours = [to_hex(container.lines[0].get_color()) for container in accuracies[0].containers]
    expected = [
        standings_view._REFERENCE,
        *(standings_view._COLOURS[name] for name in ("better", "worse", "no difference")),
    ]
    assert colours[:4] == expected[: min(rows, 4)]


def test_changes_are_for_all_and_those_in_quotes_for_one() -> None:
    plain, changed = entrants(["glyphs-protonet", "seed=7", 'glyphs-protonet "learner.name=maml" learner.steps=2'])
    assert plain.label == "glyphs-protonet"
    assert changed.label == "glyphs-protonet learner.name=maml learner.steps=2"
    assert (plain.recipe.learner.name, plain.recipe.seed) == ("protonet", 7)
    assert (changed.recipe.learner.name, changed.recipe.seed) == ("maml", 7)
    assert changed.recipe.learner.options == {"steps": 2}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "two recipes or more, and none came"),
        (["glyphs-protonet", "seed=2"], "two recipes or more, and 1 came"),
        (["glyphs-protonet", "glyphs-protonet"], "'glyphs-protonet' comes twice"),
        (["glyphs-protonet", "glyphs-maml"], "no recipe 'glyphs-maml'"),
        (["glyphs-protonet", 'glyphs-protonet "seed=2'], "cannot be read: No closing quotation"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_starts(asked: list[str], said: str) -> None:
    with pytest.raises(KshotError, match=said):
        entrants(asked)


def test_recipes_without_an_episode_in_common_are_refused_with_what_each_has() -> None:
    with pytest.raises(KshotError) as failed:
        shared_shapes(entrants(["glyphs-protonet", "omniglot-protonet"]))
    lines = str(failed.value).splitlines()
    assert lines[0] == "these recipes share no test episodes, so their figures cannot be compared:"
    assert lines[1].startswith("  glyphs-protonet: glyphs:test; 5-way 1-shot, 5 queries; 5-way 5-shot, 5 queries;")
    assert lines[2].startswith("  omniglot-protonet: omniglot:test with quarter turns; 20-way 1-shot, 15 queries;")
    with pytest.raises(KshotError, match="share no test episodes"):
        shared_shapes(entrants(["glyphs-protonet", "glyphs-protonet evaluation.queries=3"]))
    assert shared_shapes(entrants(["omniglot-protonet", "omniglot-maml"]))[0] == Shape(20, 1, 15)
    assert recipes.load("omniglot-maml").evaluation.shapes[0] == Shape(5, 1, 15)
