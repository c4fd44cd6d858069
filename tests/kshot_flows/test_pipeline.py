"""The whole pipeline on a tiny scale, everything real: data, training, ONNX, MLflow, Prefect, and being killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from typer.testing import CliRunner

from kshot.data.datasets import file_sha256
from kshot.data.episodes import Shape
from kshot.learner import InnerLoop
from kshot_flows import recipes, registry
from kshot_flows.cli.main import app
from kshot_flows.report import experiment, summary
from kshot_flows.run import start
from kshot_flows.store import embeddings, learners
from kshot_flows.store.products import Attempt, Exported, Promotion, Registered, Scores, Trained
from kshot_flows.store.results import Done
from kshot_flows.tasks.data import version_data
from kshot_flows.tasks.evaluate import evaluate
from kshot_flows.tasks.promote import promote
from kshot_flows.tasks.train import meta_train
from kshot_flows.tracking import stores
from kshot_runtime.bundle import Bundle
from kshot_runtime.errors import KshotError

STEPS = ["version_data", "meta_train", "evaluate", "export", "register", "promote"]


@dataclass
class Project:
    """A project in which the tiny recipe ran once."""

    home: Path
    first: list[Done]

    def run(self, *changes: str) -> list[Done]:
        return start.run(str(self.home / "tiny.toml"), changes)


@pytest.fixture(scope="module")
def project(
    new_project: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory, prefect_api: str
) -> Iterator[Project]:
    home = new_project(tmp_path_factory.mktemp("tiny") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSHOT_HOME", str(home))
        for name in ("KSHOT_DATA", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        project = Project(home, [])
        project.first = project.run()
        yield project


def of(done: list[Done], kind: type) -> object:
    return next(step.product for step in done if isinstance(step.product, kind))


def reused(done: list[Done]) -> list[str]:
    return [step.step for step in done if step.reused]


def test_a_first_run_takes_every_step_and_ends_in_production(project: Project) -> None:
    assert [step.step for step in project.first] == STEPS
    assert reused(project.first) == []
    promotion = of(project.first, Promotion)
    assert isinstance(promotion, Promotion)
    assert (promotion.stage, promotion.version) == ("Production", 1)


def test_its_bundle_classifies_without_torch_and_says_where_it_comes_from(project: Project) -> None:
    exported, trained = of(project.first, Exported), of(project.first, Trained)
    assert isinstance(exported, Exported)
    assert isinstance(trained, Trained)
    bundle = Bundle.open(exported.folder)
    images = trained.data.open().split("test")
    photos = images.gather(np.arange(3)[:, None], np.arange(2))  # (classes, shots + queries, C, H, W)
    state = bundle.adapt(list(photos[:, 0]), ["a", "b", "c"])
    assert bundle.classify(state, list(photos[:, 1])).probabilities.shape == (3, 3)
    facts = bundle.manifest
    assert (facts.source.recipe, facts.source.run_id, facts.learner.name) == ("tiny", trained.run, "protonet")
    assert facts.expected[0].episodes == 60
    assert facts.calibration[0].shots == 1
    assert None not in (facts.calibration[0].accepted, facts.calibration[0].false_accepts)  # the page shows both


def test_one_mlflow_run_holds_the_whole_experiment(project: Project) -> None:
    version, trained = of(project.first, Registered), of(project.first, Trained)
    assert isinstance(version, Registered)
    assert isinstance(trained, Trained)
    assert version.run == trained.run
    door = stores.client()
    run = door.get_run(version.run)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.lr"] == "0.003"
    assert run.inputs.dataset_inputs[0].dataset.digest == trained.data.version[:36]
    curve = door.get_metric_history(version.run, "train.loss")
    assert [point.step for point in curve] == list(range(1, 41))
    assert [point.step for point in door.get_metric_history(version.run, "validation.accuracy")] == [20, 40]
    assert {f"test.3w1s.{name}" for name in ("accuracy", "ece", "accepted", "false_accepts", "auroc")} <= set(
        run.data.metrics
    )
    assert "calibration.3w1s.temperature" in run.data.metrics
    head, _, row = run.data.tags["mlflow.note.content"].split("### How good it is\n")[1].splitlines()[:3]
    assert head.endswith("| calibration error | known that pass | unknown let in | AUROC |")
    assert row.startswith("| 3-way 1-shot | **")
    assert row.count("|") == head.count("|")
    assert door.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"
    pictures = {artifact.path for artifact in door.list_artifacts(version.run, "pictures")}
    drawn = ("learning-curve", "episodes-3w1s", "confusion", "embeddings", "reliability", "episode", "unknown")
    assert pictures == {f"pictures/{name}.png" for name in drawn}
    files = {artifact.path for artifact in door.list_artifacts(version.run)}
    assert {"learner.pt", "evidence.json", "recipe.json", "card.md", "report.html"} <= files


def test_report_and_card_lie_in_the_run_folder_and_the_versions_page_shows_the_card(project: Project) -> None:
    version, trained = of(project.first, Registered), of(project.first, Trained)
    assert isinstance(version, Registered)
    assert isinstance(trained, Trained)
    shown = (trained.folder / "card.md").read_text()
    assert stores.client().get_model_version("tiny", "1").description == shown
    for part in ("are wrongly refused as unknown", "are wrongly let in", trained.data.version[:16], version.run):
        assert part in shown
    report = (trained.folder / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 7
    assert "version 1 is in production: passed the gate, the first version" in report  # the gate came later
    assert not re.findall(r'(?:src|href)="(?!data:)|url\(|@import', report)  # it needs nothing beside itself
    kept = stores.client().download_artifacts(version.run, "report.html", str(project.home / ".kshot"))
    assert Path(kept).read_text() == report


def test_logged_models_are_compared_by_what_was_measured_on_a_data_set(project: Project) -> None:
    door, trained = stores.client(), of(project.first, Trained)
    assert isinstance(trained, Trained)
    experiment_id = door.get_experiment_by_name("tiny").experiment_id
    order = {"field_name": "metrics.test.3w1s.accuracy", "dataset_name": "patterns", "ascending": False}
    first, *_ = door.search_logged_models([experiment_id], order_by=[order])
    validated = [(each.step, each.value) for each in first.metrics if each.key == "validation.accuracy"]
    assert [step for step, _ in sorted(validated)] == [20, 40]
    tested = {each.key: each for each in first.metrics}["test.3w1s.accuracy"]
    assert (tested.dataset_name, tested.dataset_digest) == ("patterns", trained.data.version[:36])
    assert first.params["learner.name"] == "protonet"


def test_prefects_page_shows_the_lines_and_the_results_of_a_run_in_which_nothing_was_left_to_do(
    project: Project, prefect_api: str
) -> None:
    from prefect import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

    with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: True}), get_client(sync_client=True) as client:
        project.run()
        [run] = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        shown = {one.key: str(one.data) for one in client.read_artifacts(artifact_filter=of_run)}
        assert {"tiny-data-patterns", "tiny-learner", "tiny-scores", "tiny-bundle", "tiny-gate"} <= shown.keys()
        assert "data:image/jpeg;base64," in shown["tiny-data-patterns"]  # the contact sheet
        assert "3-way 1-shot" in shown["tiny-scores"]
        assert "Version 1 passed the gate" in shown["tiny-gate"]
        until = time.monotonic() + 30
        logged: list[str] = []
        while "  nothing has changed: the earlier result is used again" not in logged:
            assert time.monotonic() < until, logged
            time.sleep(0.5)
            of_logs = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
            logged = [log.message for log in client.read_logs(log_filter=of_logs)]
    assert "meta_train" in logged


def test_a_version_is_traced_back_to_its_data_and_its_prefect_run(project: Project) -> None:
    facts = registry.trace("tiny", 1).facts
    trained = of(project.first, Trained)
    assert isinstance(trained, Trained)
    assert facts["data (sha256)"] == trained.data.version
    assert re.fullmatch(r"[0-9a-f-]{36}", facts["Prefect run"])


def test_the_learner_file_says_what_made_it_and_gives_the_learner_back(project: Project) -> None:
    trained, scores = of(project.first, Trained), of(project.first, Scores)
    assert isinstance(trained, Trained)
    assert isinstance(scores, Scores)
    held, _ = learners.read(trained.learner.file)
    assert held["recipe"]["name"] == "tiny"
    assert held["data"] == {"patterns": trained.data.version}
    again = evaluate.fn(recipes.load(str(project.home / "tiny.toml")), trained.data, trained)
    assert again.lines == scores.lines


def test_inner_steps_are_chosen_on_validation_episodes_and_kept_in_the_learner_file(project: Project) -> None:
    """Up to 3 are tried after a training with 1, at 1 and at 5 shots. A recipe that says how many is kept to."""
    for change, chosen in (("learner.steps=1", {1, 5}), ("learner.eval_steps=2", None)):
        recipe = recipes.load(str(project.home / "tiny.toml"), ["learner.name=anil", change, "training.steps=2"])
        learner = learners.load(meta_train.fn(recipe, version_data.fn(recipe)).learner.file)
        assert isinstance(learner, InnerLoop)
        table = learner.config.model_dump()["eval_steps"]
        if chosen is None:
            assert table == learner.steps_for(1) == 2
        else:
            assert set(table) == chosen
            assert all(1 <= learner.steps_for(shots) == table[shots] <= 3 for shots in chosen)


def test_an_unchanged_run_uses_every_step_again(project: Project) -> None:
    versions = len(registry.versions("tiny"))
    done = project.run()
    assert reused(done) == STEPS
    assert [step.product for step in done] == [step.product for step in project.first]
    assert len(registry.versions("tiny")) == versions


def test_an_unchanged_run_is_known_without_importing_prefect_mlflow_or_the_exporter(
    project: Project, tmp_path: Path
) -> None:
    script = """
import sys
from kshot_flows.report import summary
from kshot_flows.run import start
done = start.run(sys.argv[1])
summary.show(done, "")
print([one.step for one in done if one.reused], file=sys.stderr)
heavy = "prefect", "mlflow", "sqlalchemy", "onnx", "matplotlib"
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    said = subprocess.run(
        [sys.executable, "-c", script, str(project.home / "tiny.toml")], capture_output=True, text=True, check=True,
        cwd=tmp_path, env={**os.environ, "PREFECT_HOME": str(tmp_path)},
    )  # fmt: skip
    assert said.stderr.splitlines() == [str(STEPS), "[]"]
    assert "tiny version 1 is in production." in said.stdout


@pytest.mark.parametrize(
    ("file", "text", "asked"),
    [
        ("profiles.toml", "", True),
        ("prefect.toml", "[api]", True),
        ("pyproject.toml", '[tool.prefect.api]\nurl = "http://there/api"', True),
        ("pyproject.toml", 'dependencies = ["prefect"]', False),
        (".env", "PREFECT_API_URL=http://there/api", True),
        (".env", "HOME=/tmp", False),
    ],
)
def test_prefect_is_asked_for_its_server_where_anything_may_name_one(
    file: str, text: str, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "prefect")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert not start._prefect_may_be_configured()
    (tmp_path / file).write_text(text)
    assert start._prefect_may_be_configured() is asked


def test_the_result_says_what_was_done_how_good_it_is_and_where_to_look(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    summary.show(project.first, "kshot run tiny.toml")
    shown = capsys.readouterr().out
    exported, scores = of(project.first, Exported), of(project.first, Scores)
    assert isinstance(exported, Exported)
    assert isinstance(scores, Scores)
    assert "tiny version 1 is in production." in shown
    line, cosine = scores.lines[0], scores.cosine()
    assert line.open_set is not None
    assert cosine is not None
    shares = line.ece, line.open_set.accepted, line.open_set.false_accepts, line.open_set.auroc
    cells = [f"{100 * line.accuracy:.2f} ± {100 * line.margin:.2f} %", *(f"{100 * share:.1f} %" for share in shares)]
    assert f"3-way 1-shot {' '.join(cells)}" in " ".join(shown.split())
    assert f"cosine baseline {100 * cosine.mean():.2f} ±" in " ".join(shown.split())
    told = " ".join(shown.split())
    assert "% on 3-way 1-shot validation episodes at step" in told
    [megabytes] = re.findall(r"s of training in ([\d,]+) MB", told)
    assert 50 < int(megabytes.replace(",", "")) < 10_000
    assert f'Bundle.open("{exported.files[0].path.rpartition("/")[0]}")' in shown
    assert "kshot trace tiny 1" in shown
    assert "mlflow ui --backend-store-uri sqlite:///" in shown


def test_the_result_says_what_whoever_uses_a_version_must_know_and_models_says_it_too(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["name=mind", "gate.max_unknown_let_in=0", "gate.max_ece=0"]
    done = project.run(*changes)
    promotion = of(done, Promotion)
    assert isinstance(promotion, Promotion)
    assert promotion.stage == "Production"
    assert [sentence.split(" % ")[0].rstrip("0123456789.") for sentence in promotion.warnings] == [
        "lets in ", "has a calibration error of ",
    ]  # fmt: skip
    capsys.readouterr()
    summary.show(done, "kshot run tiny.toml")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"mind version 1 is in production. Mind: it {promotion.warnings[0]}" in shown
    listed = " ".join(CliRunner().invoke(app, ["models", "mind"]).output.split())
    assert f"Version 1 is in production; mind: it {promotion.warnings[0]}" in listed
    assert registry.trace("mind", 1).facts["mind"] == "; ".join(promotion.warnings)
    again = promote.fn(recipes.load(str(project.home / "tiny.toml"), changes), of(done, Registered))  # type: ignore[arg-type]
    assert (again.why, again.warnings) == ("it is in production already", promotion.warnings)


def test_heads_that_were_tried_are_listed_with_the_best_of_each_learner_and_the_baseline(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = (Shape(5, 1, 5), Shape(5, 5, 5))
    tried = (
        Attempt("cosine", shapes, (0.6, 0.8), (0.01, 0.02), 0.5, False),
        Attempt("plda features=last", shapes, (0.65, 0.85), (0.01, 0.02), 1.5, False),
        Attempt("plda features=stages", shapes, (0.7, 0.9), (0.01, 0.02), 2.5, True),
    )
    trained = of(project.first, Trained)
    assert isinstance(trained, Trained)
    chosen = replace(trained, steps=0, shape=shapes[0], validation=0.7, margin=0.01, chosen=tried[2].label, tried=tried)
    summary.show([replace(project.first[1], product=chosen)], "kshot run tiny.toml")
    steps_table, heads_table = (
        [" ".join(line.split()) for line in part.splitlines()] for part in capsys.readouterr().out.split("heads tried")
    )
    assert "plda features=stages: 70.00 ± 1.00 % on 5-way 1-shot" in " ".join(steps_table)
    assert [line for line in heads_table if "±" in line] == [
        "plda features=stages 70.00 ± 1.00 % 90.00 ± 2.00 % 2.5 chosen",
        "cosine 60.00 ± 1.00 % 80.00 ± 2.00 % 0.5 the baseline",
    ]


def test_results_name_the_protocol_where_photos_have_groups(project: Project) -> None:
    scores = of(project.first, Scores)
    assert isinstance(scores, Scores)
    [line] = scores.lines
    assert scores.label(line) == "3-way 1-shot"
    across = replace(line, protocol="across groups", transductive=True)
    both = replace(scores, lines=(line, across))
    assert [both.label(each) for each in both.lines] == [
        "3-way 1-shot, random photos", "3-way 1-shot, across groups, transductive",
    ]  # fmt: skip


def test_a_changed_learning_rate_uses_the_data_again_and_nothing_else(project: Project) -> None:
    done = project.run("training.lr=1e-3")
    assert reused(done) == ["version_data"]
    champion = registry.champion("tiny")
    promotion = of(done, Promotion)
    assert isinstance(promotion, Promotion)
    assert promotion.version == 2
    assert champion == (2 if promotion.stage == "Production" else 1)
    assert json.loads(json.dumps(registry.gate_report("tiny", 2).to_dict()))["champion"] == 1  # type: ignore[union-attr]


def test_a_profile_says_where_the_time_went_and_lies_beside_the_learner_and_in_mlflow(project: Project) -> None:
    asked = ["run", str(project.home / "tiny.toml"), "name=timed", "training.steps=10", "training.validate_every=10"]
    said = CliRunner().invoke(app, [*asked, "--profile"]).output
    rows = [line.split() for line in said.partition("where the time went")[2].splitlines()]
    assert [row[0] for row in rows if row and row[0] in STEPS] == STEPS
    assert all(float(cell) >= 0 for row in rows if row and row[0] in STEPS for cell in row[1:])
    kept = {"steps.csv", "training.json.gz", "training.txt", "evaluation.json.gz", "evaluation.txt"}
    [folder] = (project.home / "runs" / "timed").glob("*/profile")
    assert {file.name for file in folder.iterdir()} == kept
    assert all("aten::convolution" in (folder / f"{what}.txt").read_text() for what in ("training", "evaluation"))
    run = registry.versions("timed")[0].run
    assert {Path(file.path).name for file in stores.client().list_artifacts(run, "profile")} == kept
    assert "Nothing ran, so there is no profile." in CliRunner().invoke(app, [*asked, "--profile"]).output


def test_other_test_episodes_use_the_training_again_and_replay_the_champion(project: Project) -> None:
    champion = registry.champion("tiny")
    done = project.run("evaluation.queries=4", "gate.min_accuracy=1.0")
    assert reused(done) == ["version_data", "meta_train"]
    version, promotion = of(done, Registered), of(done, Promotion)
    assert isinstance(version, Registered)
    assert isinstance(promotion, Promotion)
    report = registry.gate_report("tiny", version.version)
    assert report is not None
    assert report.champion == champion
    assert report.episodes == 60
    assert promotion.stage == "Staging"
    assert "were right; at least 100.00 %" in promotion.why
    assert version.run != of(project.first, Trained).run  # type: ignore[attr-defined]  # that one is version 1's
    curve = stores.client().get_metric_history(version.run, "train.loss")
    assert len(curve) == 40


def test_what_a_person_archived_no_run_puts_back(project: Project) -> None:
    name = "name=archived"
    version = of(project.run(name), Registered)
    assert isinstance(version, Registered)
    registry.move("archived", version.version, "archived", why="it sees ghosts")
    done = project.run(name)
    assert reused(done) == STEPS[:-1]
    promotion = of(done, Promotion)
    assert isinstance(promotion, Promotion)
    assert promotion.stage == "Archived"
    assert registry.champion("archived") is None


def test_a_version_deleted_from_the_registry_is_registered_again(project: Project) -> None:
    name = "name=deleted"
    first = of(project.run(name), Registered)
    assert isinstance(first, Registered)
    stores.client().delete_model_version("deleted", str(first.version))
    done = project.run(name)
    assert reused(done) == STEPS[:4]
    again = of(done, Registered)
    assert isinstance(again, Registered)
    assert again.version == first.version + 1


def test_a_name_that_no_model_can_have_is_refused_before_anything_is_trained(project: Project) -> None:
    with pytest.raises(KshotError, match=r"'bad\.moves' cannot name a model"):
        project.run("name=bad.moves", "evaluation.episodes=50")


def test_a_run_that_cannot_be_asked_for_is_not_taken_for_deleted(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> None:
        raise MlflowException("try later", error_code=TEMPORARILY_UNAVAILABLE)

    recipe = recipes.load(str(project.home / "tiny.toml"))
    assert not experiment._is_free("0" * 32, recipe)
    monkeypatch.setattr(MlflowClient, "get_run", busy)
    with pytest.raises(MlflowException, match="try later"):
        experiment._is_free("0" * 32, recipe)


@pytest.mark.parametrize("device", ["gpu", "cuda"])
def test_a_device_that_is_not_there_is_told_with_what_to_set(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("KSHOT_DEVICE", device)
    with pytest.raises(KshotError, match=rf"KSHOT_DEVICE={device} cannot be computed on: .*Set it to cpu"):
        embeddings.device()


def test_several_processes_share_one_training_and_leave_one_checkpoint(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = "backbone.norm=group", "training.episodes_per_step=2", "training.steps=4", "training.validate_every=2"
    recipe = recipes.load(str(project.home / "tiny.toml"), shared)
    monkeypatch.setenv("KSHOT_RANKS", "2")
    trained = meta_train.fn(recipe, version_data.fn(recipe))
    assert (trained.steps, sorted(file.name for file in trained.folder.glob("*.pt"))) == (4, ["last.pt", "learner.pt"])
    assert len((trained.folder / "curve.jsonl").read_text().splitlines()) == 4
    coupled = recipes.load(str(project.home / "tiny.toml"), ("training.episodes_per_step=2",))
    with pytest.raises(KshotError, match="and 2 ranks would make it another algorithm"):
        meta_train.fn(coupled, version_data.fn(coupled))
    monkeypatch.setenv("KSHOT_RANKS", "two")
    with pytest.raises(KshotError, match=r"KSHOT_RANKS=two is no number of processes\. Set it to 1 or more"):
        embeddings.ranks()


def test_data_that_changed_are_noticed(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained = of(project.first, Trained)
    assert isinstance(trained, Trained)
    assert trained.data.intact()
    shutil.copytree(project.home / "data", tmp_path / "data")
    monkeypatch.setenv("KSHOT_DATA", str(tmp_path / "data"))
    assert trained.data.intact()
    with (tmp_path / "data" / "patterns" / "images.npy").open("r+b") as images:
        images.seek(-1, os.SEEK_END)
        images.write(b"\x7f")
    assert not trained.data.intact()


def kshot(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """The real command with an embedded Prefect, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from kshot_flows.cli.main import main; main()", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=home, start_new_session=True,
        env={**os.environ, "KSHOT_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background run ignores it
    )  # fmt: skip


def checkpoint(home: Path) -> int:
    """The step of the tiny recipe's last checkpoint."""
    for file in home.glob("runs/tiny/*/last.pt"):
        return int(torch.load(file, weights_only=True)["step"])
    return 0


def stop_after_a_checkpoint(
    home: Path, arguments: Sequence[str], by: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """Run until training has made a checkpoint more than there was, then send a signal."""
    before, deadline = checkpoint(home), time.monotonic() + 120
    process = kshot(home, *arguments)
    try:
        while checkpoint(home) <= before:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(by)
        shown, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, shown)


def test_a_run_that_was_stopped_and_killed_goes_on_to_the_same_bits(
    new_project: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KSHOT_DATA", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    home = new_project(tmp_path / "stopped")
    arguments = ("run", "tiny.toml", "training.steps=400", "training.validate_every=40")

    stopped = stop_after_a_checkpoint(home, arguments, signal.SIGINT)
    assert stopped.returncode == 130
    assert stopped.stdout.splitlines()[-1].endswith(f"goes on from its last checkpoint: kshot {' '.join(arguments)}")
    assert "Traceback" not in stopped.stdout
    assert 0 < checkpoint(home) < 400

    killed = stop_after_a_checkpoint(home, arguments, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    [folder] = home.glob("runs/tiny/*")
    assert not (folder / "learner.pt").exists()

    finished = kshot(home, *arguments)
    shown, _ = finished.communicate(timeout=200)
    assert finished.returncode == 0, shown
    assert re.search(r"goes on from the checkpoint at step \d+ of 400", shown)
    assert "tiny version 1 is in production" in shown
    [run] = [version.run for version in registry_of(home)]
    monkeypatch.setenv("KSHOT_HOME", str(home))
    begun = (folder / "mlflow-run.txt").read_text()
    assert stores.client().get_run(run).data.tags["kshot.training"] == begun  # one run from beginning to end

    uninterrupted = new_project(tmp_path / "uninterrupted")
    monkeypatch.setenv("KSHOT_HOME", str(uninterrupted))
    recipe = recipes.load(str(home / "tiny.toml"), arguments[2:])
    trained = meta_train.fn(recipe, version_data.fn(recipe))
    assert trained.learner.sha256 == file_sha256(folder / "learner.pt")
    assert (trained.folder / "curve.jsonl").read_text() == (folder / "curve.jsonl").read_text()


def registry_of(home: Path) -> list[registry.Version]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSHOT_HOME", str(home))
        return registry.versions("tiny")
