"""A bundle as a logged model: its files, found again after a kill, and compared by what was measured of it."""

import json
import uuid
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from kshot_flows import registry
from kshot_flows.tracking import runs, stores
from kshot_runtime.errors import KshotError

DATA = runs.DataRef("toy", "f" * 64)


@pytest.fixture
def name(project: Path) -> str:
    return f"logged.{uuid.uuid4().hex[:8]}"  # a dot, which names of logged models cannot have


def write_bundle(folder: Path) -> Path:
    folder.mkdir()
    for file in ("adapt.onnx", "classify.onnx", "bundle.json"):
        (folder / file).write_text(f"{file} of {folder.name}")
    return folder


def logged(run: str) -> list:
    door = stores.client()
    return list(door.search_logged_models([door.get_run(run).info.experiment_id]))


def test_the_files_of_the_bundle_lie_once_beside_what_mlflow_needs(name: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    with runs.run(name, recipe={"lr": 0.1}, data=DATA, seed=1) as run:
        version = registry.register(name, run.id, bundle, card="# A card")
    door = stores.client()
    known = door.get_model_version(name, str(version))
    folder = Path(known.source)
    assert {file.name for file in folder.iterdir()} == {
        "adapt.onnx", "classify.onnx", "bundle.json", "MLmodel", "requirements.txt", "python_env.yaml",
        "input_example.json", "serving_input_example.json",
    }  # fmt: skip
    assert not list(Path(stores.uri().removeprefix("sqlite:///")).parent.glob(f"artifacts/{name}/{run.id}/**/*.onnx"))
    about = yaml.safe_load((folder / "MLmodel").read_text())
    assert about["flavors"]["python_function"]["loader_module"] == "kshot_serve.pyfunc"
    assert [column["name"] for column in json.loads(about["signature"]["inputs"])] == ["image", "label"]
    pins = (folder / "requirements.txt").read_text()
    assert "kshot==" in pins
    assert "onnxruntime-gpu==" in pins
    assert "torch" not in pins
    [model] = logged(run.id)
    assert (model.source_run_id, model.params["lr"], str(model.status)) == (run.id, "0.1", "READY")
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": name, "version": version}]
    assert [output.model_id for output in door.get_run(run.id).outputs.model_outputs] == [model.model_id]
    assert known.description == "# A card"
    fetched = registry.fetch_bundle(name, version, tmp_path / "fetched")
    assert {file.name for file in fetched.iterdir()} == {"adapt.onnx", "classify.onnx", "bundle.json"}


CALLS = (
    "create_logged_model", "log_model_artifacts", "log_outputs", "finalize_logged_model", "create_model_version",
    "set_logged_model_tags",
)  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", CALLS)
def test_registering_that_was_cut_off_is_completed_by_doing_it_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: bool
) -> None:
    bundle, real = write_bundle(tmp_path / "bundle"), getattr(MlflowClient, call)
    with runs.run(name, recipe={}, data=DATA, seed=1) as run:
        pass

    def cut(*args: object, **kwargs: object) -> None:
        if after:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, cut)
        with pytest.raises(KeyboardInterrupt):
            registry.register(name, run.id, bundle)
    assert registry.register(name, run.id, bundle) == 1
    assert [version.version for version in registry.versions(name)] == [1]
    [model] = logged(run.id)
    assert str(model.status) == "READY"
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": name, "version": 1}]
    assert len(stores.client().get_run(run.id).outputs.model_outputs) == 1
    registry.fetch_bundle(name, 1, tmp_path / "fetched")


def test_a_file_that_changed_in_the_store_is_not_served(name: str, tmp_path: Path) -> None:
    with runs.run(name, recipe={}, data=DATA, seed=1) as run:
        version = registry.register(name, run.id, write_bundle(tmp_path / "bundle"))
    Path(stores.client().get_model_version(name, str(version)).source, "adapt.onnx").write_text("something else")
    with pytest.raises(KshotError, match=r"is not what was registered: adapt\.onnx changed"):
        registry.fetch_bundle(name, version, tmp_path / "fetched")
