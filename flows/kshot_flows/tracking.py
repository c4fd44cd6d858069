"""One experiment as an MLflow run: its recipe, its data, its code, its numbers over time, its pictures."""

from __future__ import annotations

import csv
import functools
import getpass
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kshot_runtime.errors import KshotError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_BATCH = 500  # metrics in one call; MLflow takes at most 1000
_SECONDS = 2.0  # that a metric may wait for its batch


def home() -> Path:
    """The project: KSHOT_HOME, or else the current folder."""
    return Path(os.environ.get("KSHOT_HOME") or Path.cwd()).absolute()


def store() -> str:
    """MLFLOW_TRACKING_URI if set, else the project's own SQLite store. Made on first use; a dead server is an error."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow' / 'mlflow.db'}"
    if uri.startswith(("http://", "https://")):
        _answers(uri)
    elif database := _database(uri):
        _create(database)
    return uri


def public(uri: str) -> str:
    """A store's address without the password in it, to be shown."""
    return re.sub(r"//([^:/@]*):[^@/]*@", r"//\1:***@", uri)


def client() -> MlflowClient:
    """The door to the store. Always explicit: nothing here sets MLflow's global tracking URI or active run."""
    # kshot shows its own progress and its own links.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    uri = store()
    _opens(uri)
    return MlflowClient(tracking_uri=uri)


def user() -> str:
    """Who is at work, as far as this machine knows: KSHOT_USER, or else name@host."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a container may run under a number without a name
        name = str(os.getuid())
    return os.environ.get("KSHOT_USER") or f"{name}@{socket.gethostname()}"


@dataclass(frozen=True)
class DataRef:
    """The version of a data set that a run learned from, or was tested on."""

    name: str
    version: str  # sha256 of the packed files
    md5: str | None = None  # what DVC calls the data folder in data.dvc, '<md5>.dir'; None outside DVC
    source: str = ""  # where the images came from
    context: str = "meta-training"  # what they were for

    @property
    def digest(self) -> str:
        return (self.md5 or self.version)[:36]  # MLflow keeps 36 characters: exactly a DVC folder hash


@dataclass
class Run:
    """An open MLflow run. Metrics travel in batches; leaving the `with` block sends the last one."""

    id: str
    client: MlflowClient
    _waiting: list[Metric] = field(default_factory=list, repr=False)
    _sent: float = field(default_factory=time.monotonic, repr=False)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, float(value), now, step) for name, value in values.items()]
        if len(self._waiting) >= _BATCH or time.monotonic() - self._sent >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        while self._waiting:
            self.client.log_batch(self.id, metrics=self._waiting[:_BATCH])
            del self._waiting[:_BATCH]
        self._sent = time.monotonic()

    def tag(self, name: str, value: object) -> None:
        self.client.set_tag(self.id, name, str(value))

    def picture(self, name: str, figure: Figure) -> None:
        with warnings.catch_warnings():
            # A class may be named in a script that matplotlib's font lacks: boxes will do.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self.client.log_figure(self.id, figure, f"pictures/{name}.png", save_kwargs={"dpi": 150})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows as CSV, with a column for each key that any of them has."""
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
) -> Iterator[Run]:
    """Start a run of a recipe. If the block fails, the run is marked FAILED and keeps the error's text.

    The experiment bears the recipe's name. The resolved recipe becomes the run's parameters (`training.lr`) and
    `recipe.json`; the dataset version its input, and that of every other data set that the recipe names; the
    project's git commit, and what differed from it, its tags.
    """
    door = client()
    commit, dirty, changes = git()
    marks = {
        "mlflow.runName": f"{recipe_name} seed {seed}",
        "mlflow.source.name": recipe_name,
        "mlflow.user": user(),
        "kshot.recipe": recipe_name,
        "kshot.data": data.digest,
        "kshot.data.version": data.version,
        **({"kshot.data.others": ", ".join(f"{other.name} {other.version}" for other in others)} if others else {}),
        **({"mlflow.source.git.commit": commit, "kshot.git.dirty": str(dirty).lower()} if commit else {}),
        **_prefect(),
        **(tags or {}),
    }
    opened = Run(door.create_run(_experiment(door, recipe_name), tags=marks).info.run_id, door)
    with _until_the_end(opened):
        from mlflow.entities import Param

        params = [Param(key, str(value)) for key, value in flatten({**recipe, "seed": seed}).items()]
        for start in range(0, len(params), 100):  # MLflow takes 100 in one call
            door.log_batch(opened.id, params=params[start : start + 100])
        _log_data(opened, [data, *others])
        opened.json("recipe", recipe)
        if changes:
            opened.text("git.diff", changes)
        yield opened


@contextmanager
def reopen(run_id: str) -> Iterator[Run]:
    """Go on with a run that an earlier step began."""
    door = client()
    opened = Run(run_id, door)
    door.update_run(run_id, status="RUNNING")
    with _until_the_end(opened):
        yield opened


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"training": {"lr": 0.1}} -> {"training.lr": 0.1}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def git() -> tuple[str | None, bool, str]:
    """The project's commit (None outside git), whether anything differs from it, and the difference as a patch."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None, False, ""
    return commit.strip(), bool(_git("status", "--porcelain")), (_git("diff", "HEAD") or "")[:1_000_000]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=home(), capture_output=True, text=True, errors="replace")
    except OSError:  # no git on this machine, or no such folder
        return None
    return done.stdout if done.returncode == 0 else None


def _prefect() -> dict[str, str]:
    """The Prefect flow run we are in, if any: asked only of a Prefect that is already loaded."""
    if "prefect" not in sys.modules:
        return {}
    from prefect.runtime import flow_run

    return {"kshot.prefect.flow_run": str(flow_run.id)} if flow_run.id else {}


@contextmanager
def _until_the_end(opened: Run) -> Iterator[None]:
    try:
        yield
        opened.flush()
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            opened.tag("kshot.error", f"{type(error).__name__}: {error}"[:5000])
            opened.flush()
            opened.client.set_terminated(opened.id, status)
        except Exception as second:  # the first error is the one to tell
            error.add_note(f"MLflow run {opened.id} could not be marked {status}: {second}")
        raise
    opened.client.set_terminated(opened.id, "FINISHED")


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
    """The experiment's id. Another process may make it at the same moment."""
    from mlflow.exceptions import MlflowException

    for _ in range(2):
        found = door.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            door.restore_experiment(found.experiment_id)
        if found is not None:
            return str(found.experiment_id)
        database = _database(door.tracking_uri)
        # An embedded store must be told where artifacts live; by default they follow the current folder.
        place = str(_artifacts(database) / name) if database else None
        try:
            return str(door.create_experiment(name, artifact_location=place, tags=_TRAINING_PAGES))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    raise KshotError(f"MLflow says that experiment {name!r} exists, and cannot find it. Try again.")


_TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's pages then open as for models that are trained; else they show those for language models."""


def _database(uri: str) -> Path | None:
    """The file of an SQLite store; None for anything else."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).absolute() if uri.startswith(prefix) else None


def _artifacts(database: Path) -> Path:
    return database.parent / "artifacts"


def _create(database: Path) -> None:
    """Make an SQLite store once. It gets its name when complete: that takes seconds, and people press Ctrl-C."""
    if database.exists():
        return
    from filelock import FileLock

    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{database}.lock"):
            if database.exists():
                return
            unfinished = database.with_name(f"{database.name}.unfinished")
            unfinished.unlink(missing_ok=True)
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            for chatty in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(chatty).setLevel(logging.WARNING)
            SqlAlchemyStore(f"sqlite:///{unfinished}", str(_artifacts(database))).engine.dispose()
            unfinished.rename(database)
    except OSError as error:
        raise KshotError(
            f"cannot make the MLflow store {database}: {error}. Set KSHOT_HOME to a folder that you may write to, "
            "or MLFLOW_TRACKING_URI to a server."
        ) from error


@functools.cache
def _answers(uri: str) -> None:
    """Ask once whether a server is there: MLflow itself would try for minutes before it says that none is."""
    try:
        address = re.sub(r"//[^/@]*@", "//", uri).rstrip("/")  # urllib takes no name and password in it
        urllib.request.urlopen(f"{address}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return  # a server that wants a password is there
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise KshotError(
            f"no MLflow server answers at {public(uri)} ({reason}). Start it as mlflow/README.md says, or unset "
            "MLFLOW_TRACKING_URI to use the embedded store."
        ) from None


@functools.cache
def _opens(uri: str) -> None:
    """Ask once whether MLflow takes an address, and a server there our name and password."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except MlflowException as error:
        advice = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        if error.get_http_status_code() not in (401, 403):
            advice = (
                "Set MLFLOW_TRACKING_URI to a server or to a database such as sqlite:///mlflow/mlflow.db, or unset it "
                "to use the embedded store."
            )
        raise KshotError(f"MLflow cannot use {public(uri)}: {error}\n{advice}") from None
