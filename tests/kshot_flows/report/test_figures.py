"""The committed figures are one source: the tables of docs/results.md say what the file says; a run goes into it."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

from kshot_flows import recipes
from kshot_flows.report import figures
from kshot_flows.report.figures import Figure, Figures, Published, Run
from kshot_flows.tasks.data import version_data
from kshot_flows.tasks.evaluate import evaluate
from kshot_flows.tasks.train import meta_train
from kshot_runtime.errors import KshotError

ROOT = Path(__file__).parents[3]


def script(name: str) -> ModuleType:
    """A script of bench/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def known(**more: object) -> Figures:
    """One run at two shapes, and a paper's figures for both."""
    run = {
        "method": "mine", "data": "omniglot", "learner": "mine", "command": "kshot run mine", "trained": "well",
        "episodes": 1000, "inductive": {"20w1s": (94.0, 0.2), "5w1s": (98.0, 0.25)}, **more,
    }  # fmt: skip
    paper = Published(
        method="mine", data="omniglot", source="us", figures={"5w1s": Figure(98.4, 0.1), "20w1s": Figure(95.5)}
    )
    return Figures(runs=(Run.model_validate(run),), published=(paper,))


def test_the_tables_of_the_results_say_what_the_file_says() -> None:
    text = script("results_table").RESULTS.read_text()
    assert script("results_table").rewritten(text, figures.load()) == text, "run: python bench/results_table.py"


def test_the_file_is_written_as_it_is_read(tmp_path: Path) -> None:
    figures.save(figures.load(), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == figures.FILE.read_text()


def test_every_learner_in_the_file_is_installed() -> None:
    from kshot import plugins

    names = {provided.name for provided in plugins.find().of("learners")}
    assert {run.learner for run in figures.load().runs} <= names


def test_a_figure_shows_the_digits_it_was_given() -> None:
    assert str(Figure(98.7, 0.4)) == "98.7 ± 0.4"
    assert str(Figure(48.7, 1.84)) == "48.70 ± 1.84"
    assert str(Figure(98.8)) == "98.8"


def test_a_difference_shows_whether_it_stays_within_the_pass_mark() -> None:
    five, twenty = known().rows()
    assert (five.shape, five.difference, five.passed) == ("5w1s", -0.4, True)
    assert (twenty.shape, twenty.difference, twenty.passed) == ("20w1s", -1.5, False)
    elsewhere = Run(**{**known().runs[0].model_dump(), "data": "pets"})
    [row, _] = Figures(runs=(elsewhere,), published=()).rows()
    assert (row.difference, row.passed) == (None, None)


def test_transductive_figures_are_compared_with_transductive_ones() -> None:
    both = known(transductive={"5w1s": (98.5, 0.2)})
    paper = both.published[0].model_copy(update={"transductive": True})
    five, twenty = Figures(runs=both.runs, published=(paper,)).rows()
    assert five.difference == 0.1
    assert twenty.difference == -1.5  # not measured: the inductive one must do


def test_a_run_takes_the_place_of_the_one_it_repeats() -> None:
    before = known()
    better = before.runs[0].model_copy(update={"inductive": {"5w1s": Figure(99.0, 0.1)}})
    assert before.with_run(better).runs == (better,)
    other = better.model_copy(update={"method": "mine, smaller"})
    assert before.with_run(other).runs == (before.runs[0], other)


def test_an_accuracy_that_is_no_percentage_is_refused() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 100"):
        known(inductive={"5w1s": (980.0, 0.1)})


def test_a_table_marks_what_passes_and_says_where_the_rest_comes_from() -> None:
    table = script("results_table").tables(known(minutes=80), "omniglot").splitlines()
    assert table[2] == (
        "| mine | 5-way 1-shot | 98.00 ± 0.25 | the same | 98.4 ± 0.1 |  | −0.40 ✓ | 80 min | `kshot run mine` |"
    )
    assert table[3].endswith("| 94.0 ± 0.2 | the same | 95.5 |  | −1.50 ✗ |  |  |")
    assert table[-1] == "- mine, published: us"


def test_data_without_a_place_in_the_document_are_told() -> None:
    with pytest.raises(SystemExit, match="<!-- figures: omniglot -->"):
        script("results_table").rewritten("# Results", known())


def test_a_finished_run_is_found_by_its_recipe_and_becomes_a_row(
    new_project: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, record = new_project(tmp_path / "project"), script("record_figures")
    monkeypatch.setenv("KSHOT_HOME", str(home))
    for name in ("KSHOT_DATA", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    command = [str(home / "tiny.toml"), "training.steps=5", "evaluation.episodes=20"]
    recipe = recipes.load(command[0], command[1:])
    data = version_data.fn(recipe)
    scores = evaluate.fn(recipe, data, meta_train.fn(recipe, data))

    run = record.found(record.arguments([str(home), *command, "--memory", "0.5", "--note", "in a test"]))
    assert (run.method, run.learner, run.data) == ("tiny", "protonet", "patterns")
    assert run.command == f"kshot run {' '.join(command)}"
    assert run.trained == "5-way 1-shot, 3 queries, 5 episodes, in a test"
    assert (run.minutes, run.memory_gb, run.episodes, run.transductive) == (0, 0.5, 20, {})
    [line] = scores.lines
    assert line.open_set is not None
    shares = line.ece, line.open_set.auroc, line.open_set.false_accepts, line.open_set.accepted
    assert run.trust["3w1s"] == tuple(round(100 * share, 1) for share in shares)
    assert run.inductive == {"3w1s": (round(100 * line.accuracy, 2), round(100 * line.margin, 2))}

    command = [str(home / "tiny.toml"), "training.steps=0", 'learner.name=["cosine", "protonet"]']
    recipe = recipes.load(command[0], command[1:])
    evaluate.fn(recipe, data, learned := meta_train.fn(recipe, data))
    head = record.found(record.arguments([str(home), *command]))
    assert learned.chosen.startswith(head.learner)
    assert (head.trained, head.minutes) == ("not meta-trained", None)

    with pytest.raises(KshotError, match=r"of 2 trainings in .*, none is of this recipe"):
        record.found(record.arguments([str(home), command[0]]))
    with pytest.raises(KshotError, match="no scores of these test episodes"):
        record.found(record.arguments([str(home), *command, "evaluation.shots=[2]"]))
