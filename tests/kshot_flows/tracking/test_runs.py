"""Runs on a real SQLite store: what they carry, and what becomes of them when the work fails."""

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from kshot_flows.project import git
from kshot_flows.tracking import runs, stores
from kshot_runtime.errors import KshotError

DATA = runs.DataRef("toy", "f" * 64, "0" * 32 + ".dir", "drawn")
RECIPE = {"name": "toy", "training": {"lr": 0.1, "steps": 5}, "ways": [5, 20]}


def artifact(run_id: str, name: str) -> Path:
    return Path(stores.client().get_run(run_id).info.artifact_uri) / name


def test_a_run_carries_recipe_data_and_seed(project: Path) -> None:
    with runs.run("carries-all", recipe=RECIPE, data=DATA, seed=3, tags={"mine": "yes"}) as run:
        pass
    found = stores.client().get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {
        "name": "toy", "training.lr": "0.1", "training.steps": "5", "ways": "[5, 20]", "seed": "3",
    }  # fmt: skip
    assert found.data.tags["mine"] == "yes"
    dataset = found.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("toy", DATA.md5)
    assert json.loads(artifact(run.id, "recipe.json").read_text()) == RECIPE


def test_artifacts_lie_in_the_project_wherever_the_process_runs(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with runs.run("anywhere", recipe={}, data=DATA, seed=1) as run:
        run.table("rows", [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}])
        run.pictures({"empty": b"png"})
    assert artifact(run.id, "tables/rows.csv").is_relative_to(project / "mlflow" / "artifacts")
    assert artifact(run.id, "tables/rows.csv").read_text() == "a,b\n1,x\n2,y\n"
    assert artifact(run.id, "pictures/empty.png").stat().st_size
    assert list(tmp_path.iterdir()) == []


def test_metrics_over_steps_all_arrive(project: Path) -> None:
    with runs.run("metrics", recipe={}, data=DATA, seed=1) as run:
        for step in range(1200):
            run.metrics(step, {"loss": 1 / (step + 1)})
    points = stores.client().get_metric_history(run.id, "loss")
    assert sorted(point.step for point in points) == list(range(1200))


def test_a_run_that_fails_says_so_and_keeps_what_it_had(project: Path) -> None:
    def fail() -> None:
        with runs.run("fails", recipe={}, data=DATA, seed=1) as run:
            started.append(run)
            run.metrics(1, {"loss": 0.5})
            raise ValueError("no luck")

    started: list[runs.Run] = []
    with pytest.raises(ValueError, match="no luck"):
        fail()
    run = started[0]
    found = stores.client().get_run(run.id)
    assert found.info.status == "FAILED"
    assert found.data.tags["kshot.error"] == "ValueError: no luck"
    assert found.data.metrics == {"loss": 0.5}


def test_an_interrupted_run_is_killed_not_failed(project: Path) -> None:
    with pytest.raises(KeyboardInterrupt), runs.run("interrupted", recipe={}, data=DATA, seed=1) as run:
        raise KeyboardInterrupt
    assert stores.client().get_run(run.id).info.status == "KILLED"


def test_a_later_step_goes_on_with_the_run_of_an_earlier_one(project: Path) -> None:
    with runs.run("two-steps", recipe={}, data=DATA, seed=1) as first:
        first.metrics(1, {"loss": 0.5})
    with runs.run("two-steps", recipe={}, data=DATA, seed=1, again=first.id) as second:
        assert stores.client().get_run(first.id).info.status == "RUNNING"
        second.metrics(0, {"accuracy": 0.9})
    found = stores.client().get_run(first.id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"loss": 0.5, "accuracy": 0.9}


def test_a_run_knows_its_commit_and_what_differed_from_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_git(*arguments: str) -> None:
        author = ["-c", "user.name=ann", "-c", "user.email=ann@localhost"]
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "recipe.toml").write_text("lr = 0.1\n")
    run_git("init")
    run_git("add", ".")
    run_git("commit", "-m", "first")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow/mlflow.db")
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path))
    commit, dirty, changes = git()
    assert commit is not None
    assert len(commit) == 40
    assert (dirty, changes) == (False, "")

    (tmp_path / "recipe.toml").write_text("lr = 0.2\n")
    with runs.run("dirty", recipe={}, data=DATA, seed=1) as run:
        pass
    tags = stores.client().get_run(run.id).data.tags
    assert tags["mlflow.source.git.commit"] == commit
    assert tags["kshot.git.dirty"] == "true"
    assert "+lr = 0.2" in artifact(run.id, "git.diff").read_text()


def test_outside_git_a_run_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git() == (None, False, "")


def test_a_dataset_without_dvc_is_known_by_its_own_hash() -> None:
    assert runs.DataRef("toy", "f" * 64).digest == "f" * 36


def test_a_store_whose_making_was_killed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path))
    script = """
import os, signal
import mlflow.store.db.utils as utils
def half(engine):
    engine.connect().exec_driver_sql("create table experiments (half integer)")
    os.kill(os.getpid(), signal.SIGKILL)
utils._initialize_tables = half
from kshot_flows.project import git
from kshot_flows.tracking import runs
from kshot_flows.tracking import stores
stores.uri()
"""
    done = subprocess.run([sys.executable, "-c", script], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "mlflow" / "mlflow.db").exists()
    with runs.run("after-all", recipe={}, data=DATA, seed=1) as run:
        pass
    assert stores.client().get_run(run.id).info.status == "FINISHED"


def test_a_project_that_cannot_be_written_to_is_told_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path / "file"))
    with pytest.raises(KshotError, match="Set KSHOT_HOME"):
        stores.uri()


def test_a_folder_as_a_store_is_refused_with_what_may_be_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(
        KshotError, match=r"cannot use \./mlruns: .*maintenance mode(.|\n)*Set MLFLOW_TRACKING_URI to a"
    ):
        stores.client()


def test_a_server_that_wants_a_password_is_answered_with_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Guarded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 401)
            self.end_headers()

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(KshotError, match=r"401(.|\n)*Set MLFLOW_TRACKING_USERNAME"):
            stores.client()
        server.shutdown()
