"""What hangs, is torn, moved or left behind: nothing is lost, nothing half is used, and the next run is right."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kshot.training import Progress
from kshot_flows import recipes
from kshot_flows.cli.main import app
from kshot_flows.store import learners, results
from kshot_flows.tasks.data import version_data
from kshot_flows.tasks.train import meta_train
from kshot_flows.tracking import curves, runs, stores
from kshot_runtime.errors import KshotError

DATA = runs.DataRef("toy", "f" * 64)


@pytest.fixture
def home(new_project: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("KSHOT_DATA", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path / "project"))
    return new_project(tmp_path / "project")


def steps_of(run: str) -> list[int]:
    return [point.step for point in stores.client().get_metric_history(run, "train.loss")]


def test_an_mlflow_that_hangs_or_dies_neither_ends_nor_stalls_a_training_and_gets_its_curve_later(
    mlflow_server: Callable[[], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(curves, "_PATIENCE", 0.5)
    monkeypatch.setattr(curves, "_SECONDS", 0.1)
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path))
    server = mlflow_server()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    curve = curves.Curve(tmp_path / "runs" / "curve.jsonl", 100, 0)

    def train(first: int, last: int, send: Callable[[Any], None]) -> float:
        began = time.monotonic()
        for step in range(first, last + 1):
            time.sleep(0.02)
            send(curve.add(Progress(step, 100, 1 / step, 0.1, 0.0)))
        return time.monotonic() - began

    with runs.run("hangs", recipe={}, data=DATA, seed=1, patient=True) as run, curves.sending(run, curve) as send:
        train(1, 10, send)
        server.signal(signal.SIGSTOP)  # it takes connections and answers none
        assert train(11, 60, send) < 5
        server.signal(signal.SIGCONT)
        while len(steps_of(run.id)) < 60:
            time.sleep(0.1)
        train(61, 62, send)
        server.signal(signal.SIGKILL)
        assert train(63, 100, send) < 5
        began = time.monotonic()
    assert time.monotonic() - began < 5  # leaving took no longer, and raised nothing
    told = " ".join(capsys.readouterr().out.split())
    place = re.escape(f"MLflow at {server.uri}")
    assert re.search(rf"{place} does not answer.*; metrics are kept in runs/curve\.jsonl and sent when it does", told)
    assert re.search(rf"{place} answers again, and has the metrics", told)
    assert re.search(rf"{place} does not have all metrics.*; they are in runs/curve\.jsonl", told)
    stores._answered.clear()
    began = time.monotonic()
    with pytest.raises(KshotError, match=rf"no MLflow server answers at {server.uri}.*refused"):
        runs.run("hangs", recipe={}, data=DATA, seed=1, again=run.id).__enter__()
    assert time.monotonic() - began < 5

    mlflow_server()
    with runs.run("hangs", recipe={}, data=DATA, seed=1, again=run.id) as again:
        curves.send_missing(again, curves.read(curve.file))
        curves.send_missing(again, curves.read(curve.file))
    assert sorted(steps_of(run.id)) == list(range(1, 101))  # each once
    assert stores.client().get_run(run.id).info.status == "FINISHED"


def test_a_training_goes_on_from_the_checkpoint_before_a_torn_one_and_starts_anew_from_a_foreign_one(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipes.load(str(home / "tiny.toml"))
    data = version_data.fn(recipe)
    trained = meta_train.fn(recipe, data)
    last = trained.folder / "last.pt"
    assert [file.name for file in trained.folder.glob("*.pt")] in (["last.pt", "learner.pt"], ["learner.pt", "last.pt"])
    (trained.folder / "curve.jsonl").write_bytes(b"\0\0\n{\n" + (trained.folder / "curve.jsonl").read_bytes() + b'{"st')
    (trained.folder / "mlflow-run.txt").write_text("")
    (trained.folder / ".last.pt.123").write_bytes(b"of a writer that was killed")
    capsys.readouterr()
    last.write_bytes(b"")
    assert meta_train.fn(recipe, data).learner.sha256 == trained.learner.sha256
    told = " ".join(capsys.readouterr().out.split())
    assert f"{last.relative_to(home)} cannot be read; it is last.pt.damaged now" in told
    assert not (trained.folder / ".last.pt.123").exists()

    held = torch.load(last, weights_only=True)
    torch.save({**held, "step": 20, "settings": {**held["settings"], "lr": 1.0}}, last)
    assert meta_train.fn(recipe, data).learner.sha256 == trained.learner.sha256
    told = " ".join(capsys.readouterr().out.split())
    assert f"{last.relative_to(home)} is of another training: its settings.lr was 1.0, and is now 0.003" in told
    assert "goes on from" not in told

    whole = trained.learner.file.read_bytes()
    for torn in (b"", whole[:200], whole[: len(whole) // 2]):
        trained.learner.file.write_bytes(torn)
        assert not trained.intact()
        with pytest.raises(KshotError, match=r"learner\.pt is damaged or no learner"):
            learners.read(trained.learner.file)
    trained.learner.file.write_bytes(whole)
    held = torch.load(trained.learner.file, weights_only=True)
    del held["weights"]["backbone.blocks.0.weight"]
    torch.save(held, trained.learner.file)
    with pytest.raises(KshotError, match=r"learner\.pt was written by another version of kshot .* Missing key"):
        learners.load(trained.learner.file)


def test_a_project_that_was_moved_finds_its_artifacts_and_its_registry_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runs.run("moves", recipe={}, data=DATA, seed=1) as run:
        run.text("here.txt", "content")
    door, label = stores.client(), stores.label()
    door.create_registered_model("moves")
    source = f"{door.get_run(run.id).info.artifact_uri}/bundle"
    door.create_model_version("moves", source, run.id)
    moved = home.with_name("moved, with a space")
    home.rename(moved)
    monkeypatch.setenv("KSHOT_HOME", str(moved))
    door = stores.client()
    assert stores.label() == label == "sqlite:///mlflow/mlflow.db"
    found = Path(door.get_run(run.id).info.artifact_uri)
    assert (found / "here.txt").read_text() == "content"
    assert found.is_relative_to(moved)
    assert door.get_model_version("moves", "1").source == f"{found}/bundle"
    assert door.get_model_version_download_uri("moves", "1") == f"{found}/bundle"
    with runs.run("moves", recipe={}, data=DATA, seed=2) as later:
        later.text("there.txt", "content")
    assert not home.exists()


def test_gc_lists_what_was_left_behind_and_removes_it_after_a_yes(home: Path) -> None:
    opening = """
import os, signal
from kshot_flows.tracking import runs
with runs.run("killed", recipe={}, data=runs.DataRef("toy", "f" * 64), seed=1) as run:
    run.text("note", "x")
    print(run.id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", opening], capture_output=True, text=True).stdout.strip()
    folder = home / "runs" / "tiny" / "0123456789ab"
    scratch, unfinished = folder / ".bundle-1-x", folder / ".last.pt.999999999"
    scratch.mkdir(parents=True)
    checkpoint = folder / "last.pt"
    for file in (scratch / "a.onnx", unfinished, checkpoint):
        file.write_bytes(b"x" * 5000)
    results.folder().mkdir(parents=True)
    record = results.folder() / "train-gone"
    record.write_text("{")
    for path in (scratch / "a.onnx", scratch, unfinished, record):
        os.utime(path, (1, 1))
    door = stores.client()
    door.create_registered_model("twice")
    for _ in range(2):
        door.create_model_version("twice", f"{home}/mlflow/artifacts/x", killed, tags={"bundle": "same"})
    with runs.run("lives", recipe={}, data=DATA, seed=1) as living:
        asked = CliRunner().invoke(app, ["gc"], input="n\n")
        assert asked.exit_code == 1
        listed = asked.output
        for what in (scratch, unfinished, record):
            assert str(what.relative_to(home)) in listed
        assert f"killed {killed}, RUNNING, and its process is gone" in listed
        assert "twice 2, the same bundle as version 1 and in no stage" in listed
        assert living.id not in listed
        assert "last.pt\n" not in listed
        assert unfinished.exists()
        done = CliRunner().invoke(app, ["gc", "--yes"])
    assert done.exit_code == 0, done.output
    assert re.search(r"Done: 5, \d", done.output)
    assert not any(path.exists() for path in (scratch, unfinished, record))
    assert checkpoint.exists()  # of a training that can go on
    assert door.get_run(killed).info.status == "KILLED"
    assert [version.version for version in door.search_model_versions("name='twice'")] == [1]
    assert "Nothing is left behind" in CliRunner().invoke(app, ["gc"]).output
    os.utime(checkpoint, (1, 1)), os.utime(folder, (1, 1))
    assert "unfinished training" in CliRunner().invoke(app, ["gc", "--also", "trainings", "--yes"]).output
    assert not folder.exists()


def test_doctor_says_what_is_well_what_is_wrong_and_what_to_do(home: Path, prefect_api: str) -> None:
    well = CliRunner().invoke(app, ["doctor", "--json"])
    found = {one["what"]: one for one in json.loads(well.output)}
    assert well.exit_code == 0, well.output
    assert list(found) == ["libraries", "devices", "disk", "MLflow", "registry", "Prefect", "data", "leftovers"]
    assert found["Prefect"]["says"] == f"{prefect_api} answers"
    with (home / "data" / "patterns" / "images.npy").open("r+b") as images:
        images.seek(-1, os.SEEK_END)
        images.write(b"\x7f")
    shutil.copy(home / "tiny.toml", home / "mlflow" / "mlflow.db")
    stores._opens.cache_clear()
    ill = CliRunner().invoke(app, ["doctor"])
    assert ill.exit_code == 1
    assert "wrong data: patterns is damaged To do: kshot data pull" in ill.output
    assert "wrong MLflow: " in ill.output
    assert "ok disk: " in ill.output
