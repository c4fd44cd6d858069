"""One experiment as an MLflow run: recipe, data, code, metrics and pictures."""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kshot_flows import project
from kshot_flows.data import extras
from kshot_flows.tracking import stores
from kshot_runtime.errors import KshotError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_BATCH = 1000  # metrics per call, MLflow's maximum
_SECONDS = 2.0  # seconds that a metric may wait for its batch
PROCESS = "kshot.process"
"""The tag of a run that names the process which works at it."""


@dataclass(frozen=True)
class DataRef:
    """The version of a data set that a run used."""

    name: str
    version: str  # sha256 of the packed files
    md5: str | None = None  # DVC's hash of the data folder in data.dvc, '<md5>.dir'; None outside DVC
    source: str = ""  # where the images came from
    context: str = "meta-training"  # their uses in the run

    @property
    def digest(self) -> str:
        return (self.md5 or self.version)[:36]  # MLflow stores 36 characters: exactly a DVC folder hash


@dataclass
class Run:
    """An open MLflow run. Metrics travel in batches; leaving the `with` block sends the last one."""

    id: str
    client: MlflowClient
    away: bool = False  # whether MLflow has stopped answering: the run is then left open
    _waiting: list[tuple[int, Mapping[str, float]]] = field(default_factory=list, repr=False)
    _sent: float = field(default_factory=time.monotonic, repr=False)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._waiting.append((step, values))
        if len(self._waiting) >= _BATCH or time.monotonic() - self._sent >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        self.send(self._waiting)
        self._waiting.clear()
        self._sent = time.monotonic()

    def send(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Send metric values at given steps immediately."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.log([Metric(name, float(value), now, step) for step, values in points for name, value in values.items()])

    def log(self, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), _BATCH):
            self.client.log_batch(self.id, metrics=metrics[start : start + _BATCH])

    def steps(self, metric: str) -> set[int]:
        """The steps at which the run has a metric."""
        return {point.step for point in self.client.get_metric_history(self.id, metric)}

    def tag(self, name: str, value: object) -> None:
        self.client.set_tag(self.id, name, str(value))

    def pictures(self, drawn: Mapping[str, bytes]) -> None:
        """Log PNG files by name, in one call."""
        with tempfile.TemporaryDirectory() as scratch:
            for name, png in drawn.items():
                Path(scratch, f"{name}.png").write_bytes(png)
            self.client.log_artifacts(self.id, scratch, "pictures")

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log rows as CSV, with a column for each key that occurs."""
        text, columns = io.StringIO(), dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.client.log_text(self.id, text.getvalue(), f"tables/{name}.csv")

    def json(self, name: str, value: Any) -> None:
        self.client.log_text(self.id, json.dumps(value, indent=2), f"{name}.json")

    def text(self, file: str, text: str) -> None:
        self.client.log_text(self.id, text, file)

    def file(self, path: Path) -> None:
        self.client.log_artifact(self.id, str(path))


@contextmanager
def run(
    recipe_name: str,
    *,
    recipe: Mapping[str, Any],
    data: DataRef,
    others: Sequence[DataRef] = (),
    seed: int,
    tags: Mapping[str, str] | None = None,
    again: str | None = None,
    patient: bool = False,
) -> Iterator[Run]:
    """Start a run of a recipe, or resume the run `again`. If the block fails, it is marked FAILED with the error.

    The experiment bears the recipe's name. The resolved recipe becomes the run's parameters (`training.lr`) and
    `recipe.json`; the dataset version its input, and that of every other data set that the recipe names; the
    project's git commit, and what differed from it, its tags. With `patient`, an MLflow that no longer answers at the
    end is no error: the run stays open, for a later step.
    """
    door = stores.client()
    commit, dirty, changes = project.git()
    marks = {
        "mlflow.runName": f"{recipe_name} seed {seed}",
        "mlflow.source.name": recipe_name,
        "mlflow.user": project.user(),
        PROCESS: _process(),
        "kshot.recipe": recipe_name,
        "kshot.data": data.digest,
        "kshot.data.version": data.version,
        **({"kshot.data.others": ", ".join(f"{other.name} {other.version}" for other in others)} if others else {}),
        **({"mlflow.source.git.commit": commit, "kshot.git.dirty": str(dirty).lower()} if commit else {}),
        **_prefect(),
        **(tags or {}),
    }
    opened = Run(again or door.create_run(_experiment(door, recipe_name), tags=marks).info.run_id, door)
    if again:
        door.update_run(again, status="RUNNING")
        opened.tag(PROCESS, _process())
    with _until_the_end(opened, patient):
        if not again or "recipe.json" not in {artifact.path for artifact in door.list_artifacts(again)}:
            _describe(opened, recipe, seed, [data, *others], changes)
        yield opened


def _describe(opened: Run, recipe: Mapping[str, Any], seed: int, data: Sequence[DataRef], changes: str) -> None:
    """Log the initial data of a run. `recipe.json` is last: if it is missing, the initial data are incomplete."""
    from mlflow.entities import Param

    params = [Param(key, str(value)) for key, value in flatten({**recipe, "seed": seed}).items()]
    for start in range(0, len(params), 100):  # MLflow's maximum is 100 per call
        opened.client.log_batch(opened.id, params=params[start : start + 100])
    _log_data(opened, data)
    if changes:
        opened.text("git.diff", changes)
    opened.json("recipe", recipe)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"training": {"lr": 0.1}} -> {"training.lr": 0.1}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _process() -> str:
    """An identifier of this process, by which `gc` finds runs of dead processes."""
    import psutil

    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def alive(process: str) -> bool | None:
    """Whether the process of a run is alive; None if it is on another machine."""
    import psutil

    host, number, began = process.rsplit(" ", 2)
    if host != socket.gethostname():
        return None
    try:
        return abs(psutil.Process(int(number)).create_time() - float(began)) < 2
    except psutil.NoSuchProcess:
        return False


def _prefect() -> dict[str, str]:
    """The current Prefect flow run, if any, without importing Prefect."""
    if "prefect" not in sys.modules:
        return {}
    from prefect.runtime import flow_run

    return {"kshot.prefect.flow_run": str(flow_run.id)} if flow_run.id else {}


@contextmanager
def _until_the_end(opened: Run, patient: bool) -> Iterator[None]:
    try:
        yield
        opened.flush()
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            stores.answers(opened.client.tracking_uri)
            opened.tag("kshot.error", f"{type(error).__name__}: {error}"[:5000])
            opened.flush()
            opened.client.set_terminated(opened.id, status)
        except Exception as second:  # report the first error
            error.add_note(f"MLflow run {opened.id} could not be marked {status}: {second}")
        raise
    if opened.away:
        return
    try:
        stores.answers(opened.client.tracking_uri)
        opened.client.set_terminated(opened.id, "FINISHED")
    except Exception:
        if not patient:
            raise


def _log_data(opened: Run, data: Sequence[DataRef]) -> None:
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    inputs = []
    for ref in data:
        source = CodeDatasetSource(tags={"kshot.source": ref.source, "kshot.data.version": ref.version})
        dataset = MetaDataset(source, name=ref.name, digest=ref.digest)
        context = InputTag("mlflow.data.context", ref.context)
        inputs.append(DatasetInput(dataset._to_mlflow_entity(), tags=[context]))
    opened.client.log_inputs(opened.id, inputs)


def _experiment(door: MlflowClient, name: str) -> str:
    """The experiment's id, created if missing, even by several processes at once."""
    from mlflow.exceptions import MlflowException

    for _ in range(2):
        found = door.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            door.restore_experiment(found.experiment_id)
        if found is not None:
            if why_not := extras.missing(found.artifact_location):
                raise KshotError(why_not)
            return str(found.experiment_id)
        database = stores.database_of(door.tracking_uri)
        # An embedded store needs an explicit artifact location; by default it is relative to the current folder.
        place = str(stores.artifacts(database) / name) if database else None
        try:
            door.create_experiment(name, artifact_location=place, tags=_TRAINING_PAGES)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    raise KshotError(f"MLflow says that experiment {name!r} exists, and cannot find it. Try again.")


_TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's pages then open as for models that are trained; else they show those for language models."""
