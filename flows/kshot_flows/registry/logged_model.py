"""Logs a bundle as an MLflow logged model, with the files that `mlflow.pyfunc` needs to load it."""

from __future__ import annotations

import json
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

CLAIM = "kshot.bundle"
"""A tag of runs and logged models: the hash of the bundle that they are about. It is set before all else, so that
whoever goes on after a process that was killed finds what that one began."""

_VERSIONS = "mlflow.modelVersions"
_SQUARE, _CROSS = (  # 8 x 8 pixels
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAG0lEQVR42mNgQAeMDAz/GRgYGBmYYCKYDEwAADRSAQiRgurpAAAAAElFTkSuQmCC",
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAHklEQVR42mNgYGD4/5+BgYGJAQrgDMb/6CIMuBUDAOD9BQeK2M0yAAAAAElFTkSuQmCC",
)
_EXAMPLE = {"columns": ["image", "label"], "data": [[_SQUARE, "square"], [_CROSS, "cross"], [_SQUARE, None]]}


def log(door: MlflowClient, name: str, run: Run, bundle: Path, identity: str, note: str) -> LoggedModel:
    """The logged model of a run's bundle, complete; idempotent."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    experiment, about = run.info.experiment_id, f"tags.`{CLAIM}` = '{identity}'"
    found = door.search_logged_models([experiment], filter_string=f"source_run_id = '{run.info.run_id}' AND {about}")
    model = next(iter(found), None) or door.create_logged_model(
        experiment,
        name=name.replace(".", "-"),  # MLflow's names of logged models have no dots
        source_run_id=run.info.run_id,
        tags={CLAIM: identity, "mlflow.note.content": note},
        params=run.data.params,
        model_type="few-shot classifier",
    )
    if model.status == LoggedModelStatus.READY:
        return model
    with tempfile.TemporaryDirectory() as scratch:
        _describe(model, Path(scratch))
        door.log_model_artifacts(model.model_id, str(bundle))
        door.log_model_artifacts(model.model_id, scratch)
    if model.model_id not in {output.model_id for output in (run.outputs.model_outputs if run.outputs else ())}:
        door.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])
    return door.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def link(door: MlflowClient, model: LoggedModel, name: str, version: int) -> None:
    """Link the logged model to its version, which an MLflow server does itself but the SQLite store does not."""
    linked = json.loads(door.get_logged_model(model.model_id).tags.get(_VERSIONS, "[]"))
    if not any(one["name"] == name and int(one["version"]) == version for one in linked):
        door.set_logged_model_tags(
            model.model_id, {_VERSIONS: json.dumps([*linked, {"name": name, "version": version}])}
        )


def _describe(model: LoggedModel, folder: Path) -> None:
    """Write MLmodel and the files that it names, without mlflow.pyfunc, whose import prints a warning."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    requirements, environment, example, serving = (
        "requirements.txt", "python_env.yaml", "input_example.json", "serving_input_example.json",
    )  # fmt: skip
    about = Model(
        artifact_path=model.artifact_location,
        run_id=model.source_run_id,
        model_id=model.model_id,
        model_uuid=model.model_id,
        signature=ModelSignature(
            Schema([ColSpec("binary", "image"), ColSpec("string", "label", required=False)]),
            Schema([ColSpec("string", "class"), ColSpec("double", "probability"), ColSpec("boolean", "unknown")]),
            ParamSchema([ParamSpec("accept", "double", None)]),
        ),
        saved_input_example_info={
            "artifact_path": example, "type": "dataframe", "pandas_orient": "split", "serving_input_path": serving,
        },
    )  # fmt: skip
    about.add_flavor(
        "python_function",
        loader_module="kshot_serve.pyfunc",
        python_version=platform.python_version(),
        env={"virtualenv": environment},
        config={"device": "cpu", "threads": 1},
    )
    onnxruntime = [needed for needed in metadata.requires("kshot") or () if needed.startswith("onnxruntime")]
    pins = [f"mlflow=={metadata.version('mlflow')}", f"kshot=={metadata.version('kshot')}", *onnxruntime]
    (folder / requirements).write_text("\n".join(pins) + "\n")
    (folder / environment).write_text(
        f"python: {platform.python_version()}\nbuild_dependencies: [pip]\ndependencies: [-r {requirements}]\n"
    )
    (folder / example).write_text(json.dumps(_EXAMPLE))
    (folder / serving).write_text(json.dumps({"dataframe_split": _EXAMPLE}))
    about.save(str(folder / "MLmodel"))
