"""`kshot gc`: finds leftovers of interrupted work, and removes them on request."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from kshot_flows import project, registry
from kshot_flows.data import versioning
from kshot_flows.store import embeddings, results
from kshot_flows.tracking import runs, stores
from kshot_runtime.errors import KshotError

_IDLE = 3600.0  # seconds without a write after which a file counts as left behind
_HISTORY = ("prefect.db", "prefect.db-wal", "prefect.db-shm")


@dataclass(frozen=True)
class Leftover:
    """Something that can be removed."""

    kind: str
    what: str
    size: int  # bytes, 0 if it is not a file
    remove: Callable[[], object]


def find(extras: Collection[str] = ()) -> Iterator[Leftover]:
    """Everything in the project and its registry that is no longer used.

    With `extras` also what may still be useful: "trainings", "embeddings", "prefect", "mlflow", "dvc".
    """
    home = project.home()
    hidden, root = home / ".kshot", versioning.data_root()
    for file in (home / "runs").glob("*/*/.*.pt.*"):
        if not (file.suffix[1:].isdigit() and psutil.pid_exists(int(file.suffix[1:]))) and _idle(file, 1 / 60):
            yield _path("temporary file", file)
    for pattern in ("runs/*/*/.bundle-*", "runs/*/*/*.unfinished", "mlflow/*.unfinished"):
        yield from (_path("temporary file", path) for path in home.glob(pattern) if _idle(path))
    yield from (_path("unfinished import", path) for path in root.glob(".importing-*") if _idle(path))
    yield from (_path("damaged checkpoint", path) for path in (home / "runs").glob("*/*/*.pt.damaged"))
    for record in sorted(results.folder().glob("*")) if results.folder().exists() else ():
        if _idle(record, 1 / 60) and not results.usable(record.name):
            yield _path("result of a step whose files are gone or changed", record)
    yield from (_path("lock", path) for path in (hidden / "locks").glob("*.lock") if _idle(path, 24) and _free(path))
    if "trainings" in extras:
        for folder in (home / "runs").glob("*/*/"):
            if not (folder / "learner.pt").exists() and _idle(folder):
                yield _path("unfinished training, with its checkpoint", folder)
    if "embeddings" in extras and embeddings.folder().exists():
        yield _path("embeddings, which are computed again when needed", embeddings.folder())
    if "prefect" in extras and (hidden / _HISTORY[0]).exists() and _free(hidden / "prefect-server.lock"):
        yield from (_path("Prefect's records of runs and schedules", hidden / name) for name in _HISTORY)
    yield from _registry("mlflow" in extras)
    if "dvc" in extras and versioning.versioned(root):
        keep = ["--all-commits"] if (home / ".git").exists() else []
        command = [sys.executable, "-m", "dvc", "gc", "--workspace", *keep, "--force"]
        yield Leftover("data", "in DVC's cache that no commit names: dvc gc", 0, partial(_call, command))


def _registry(deleted: bool) -> Iterator[Leftover]:
    """Leftovers in MLflow: runs of dead processes, interrupted moves, duplicate versions."""
    from mlflow.entities import ViewType

    door = stores.client()
    experiments = {each.experiment_id: each.name for each in door.search_experiments()}
    for run in door.search_runs(list(experiments), "attributes.status = 'RUNNING'"):
        process = run.data.tags.get(runs.PROCESS)
        if process and runs.alive(process) is False:
            what = f"{experiments[run.info.experiment_id]} {run.info.run_id}, RUNNING, and its process is gone"
            yield Leftover("MLflow run", what, 0, partial(door.set_terminated, run.info.run_id, "KILLED"))
    for name in registry.models():
        for sentence in registry.disagreements(name):
            yield Leftover("interrupted move", f"{name}: {sentence}", 0, partial(registry.settle, name))
        known = {version.version: version for version in registry.versions(name)}
        first: dict[str, int] = {}
        for number in sorted(known, key=lambda number: (known[number].stage == "None", number)):
            version, bundle = known[number], known[number].tags.get("bundle", str(number))
            if first.setdefault(bundle, number) != number and version.stage == "None" and not version.aliases:
                what = f"{name} {number}, the same bundle as version {first[bundle]} and in no stage"
                yield Leftover("version", what, 0, partial(door.delete_model_version, name, str(number)))
    if deleted and (gone := door.search_runs(list(experiments), run_view_type=ViewType.DELETED_ONLY)):
        place = door.tracking_uri
        command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", place, "--tracking-uri", place]
        yield Leftover(
            "MLflow runs", f"{len(gone)} that were deleted in its pages: mlflow gc", 0, partial(_call, command)
        )


def _path(kind: str, path: Path) -> Leftover:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    shown = path.relative_to(project.home()) if path.is_relative_to(project.home()) else path
    remove = partial(path.unlink, missing_ok=True) if path.is_file() else partial(shutil.rmtree, path)
    return Leftover(kind, str(shown), sum(file.stat().st_blocks * 512 for file in files), remove)


def _idle(path: Path, hours: float = _IDLE / 3600) -> bool:
    """Whether nothing in it was written for this long."""
    newest = max((each.stat().st_mtime for each in (path, *path.rglob("*"))), default=0.0)
    return time.time() - newest > 3600 * hours


def _free(lock: Path) -> bool:
    try:
        with FileLock(lock).acquire(timeout=0):
            return True
    except Timeout:
        return False


def _call(command: list[str]) -> None:
    done = subprocess.run(command, cwd=project.home(), capture_output=True, text=True)
    if done.returncode:
        raise KshotError(
            f"{' '.join(command[2:4])}: {(done.stderr.strip() or done.stdout.strip() or 'failed').splitlines()[-1]}"
        )
