"""MLflow's store of runs and versions: the project's SQLite store, or that of MLFLOW_TRACKING_URI."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import socket
import sqlite3
import time
import urllib.error
import urllib.request
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kshot_flows import project
from kshot_flows.data import extras
from kshot_runtime.errors import KshotError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SETTINGS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # kshot prints its own progress and links
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default of 7 means nine minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_FRESH = 10.0  # seconds for which a server that answered is assumed to be reachable
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def uri() -> str:
    """MLFLOW_TRACKING_URI if set, else the project's SQLite store, created on first use; an error if unreachable."""
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project.home() / 'mlflow' / 'mlflow.db'}"
    if database := database_of(address):
        _create(database)
        _follow_a_move(database)
    elif why_not := extras.missing(address):
        raise KshotError(why_not)
    else:
        answers(address)
    return address


def label() -> str:
    """The store's label in names and cache keys: without a password, unchanged if the project's folder is moved."""
    return public(uri()).replace(f"sqlite:///{project.home()}/", "sqlite:///")


def public(uri: str) -> str:
    """A store's address for display, without its password."""
    return re.sub(r"//([^:/@]*):[^@/]*@", r"//\1:***@", uri)


def client() -> MlflowClient:
    """An MLflow client of the store; MLflow's global tracking URI and active run are never set."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # it prints tracebacks of errors that it raises
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    address = uri()
    _opens(address)
    return MlflowClient(tracking_uri=address)


def database_of(uri: str) -> Path | None:
    """The file of an SQLite store; None for other stores."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).absolute() if uri.startswith(prefix) else None


def artifacts(database: Path) -> Path:
    return database.parent / "artifacts"


def _create(database: Path) -> None:
    """Create an SQLite store atomically: it takes seconds, and may be interrupted by Ctrl-C."""
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
def _follow_a_move(database: Path) -> None:
    """Rewrite artifact paths, which MLflow stores as absolute ones, if the store was moved."""
    now = str(artifacts(database))
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        first = connection.execute("SELECT artifact_location FROM experiments WHERE experiment_id = 0").fetchone()
        then = str(first[0]).removesuffix("/0") if first else now
        if then == now or Path(then).name != Path(now).name:  # not moved, or not created by kshot
            return
        for table, column in _PATHS:
            moved = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
            connection.execute(moved, (now, len(then) + 1, len(then) + 1, f"{then}/"))


_PATHS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


_answered: dict[str, float] = {}  # time of each server's last answer


def answers(uri: str) -> None:
    """Check that a server is reachable, unless it just answered; MLflow itself would retry for minutes."""
    if time.monotonic() - _answered.get(uri, -math.inf) < _FRESH:
        return
    address = urlsplit(uri)
    try:
        if address.scheme in ("http", "https"):
            plain = re.sub(r"//[^/@]*@", "//", uri).rstrip("/")  # urllib does not accept credentials in the URL
            with suppress(urllib.error.HTTPError):  # a server that requires a password is reachable
                urllib.request.urlopen(f"{plain}/health", timeout=10).close()
        elif address.hostname and (port := address.port or _PORTS.get(address.scheme.partition("+")[0])):
            socket.create_connection((address.hostname, port), timeout=10).close()
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise KshotError(
            f"no MLflow server answers at {public(uri)} ({reason}). Start it as mlflow/README.md says, or unset "
            "MLFLOW_TRACKING_URI to use the embedded store."
        ) from None
    _answered[uri] = time.monotonic()


def reason(error: object) -> str:
    """A short reason for a failed call, from MLflow's nested errors."""
    text = str(error)
    for sign, words in _REASONS.items():
        if sign in text:
            return words
    return text.partition("\n")[0][:200]


_REASONS = {
    "Connection refused": "connection refused",
    "onnection attempts failed": "connection refused",  # httpx
    "Connect call failed": "connection refused",  # asyncio
    "Name or service not known": "there is no such host",
    "timed out": "no answer in time",
    "database or disk is full": "the disk is full",
    "No space left on device": "the disk is full",
    "database is locked": "its database is locked",
}


@functools.cache
def _opens(uri: str) -> None:
    """Check once that MLflow supports an address, and that a server there accepts the credentials."""
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
