"""Where MLflow keeps runs and versions: the project's own SQLite store, or the one that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import functools
import logging
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from kshot_flows import project
from kshot_runtime.errors import KshotError

if TYPE_CHECKING:
    from mlflow import MlflowClient


def uri() -> str:
    """MLFLOW_TRACKING_URI if set, else the project's own SQLite store. Made on first use; a dead server is an error."""
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project.home() / 'mlflow' / 'mlflow.db'}"
    if address.startswith(("http://", "https://")):
        _answers(address)
    elif database := database_of(address):
        _create(database)
    return address


def public(uri: str) -> str:
    """A store's address without the password in it, to be shown."""
    return re.sub(r"//([^:/@]*):[^@/]*@", r"//\1:***@", uri)


def client() -> MlflowClient:
    """The door to the store. Always explicit: nothing here sets MLflow's global tracking URI or active run."""
    # kshot shows its own progress and its own links.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    address = uri()
    _opens(address)
    return MlflowClient(tracking_uri=address)


def database_of(uri: str) -> Path | None:
    """The file of an SQLite store; None for anything else."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).absolute() if uri.startswith(prefix) else None


def artifacts(database: Path) -> Path:
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
            SqlAlchemyStore(f"sqlite:///{unfinished}", str(artifacts(database))).engine.dispose()
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
