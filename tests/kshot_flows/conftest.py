"""A real SQLite MLflow store, made once: its tables take seconds."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kshot_flows import tracking


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder whose MLflow store exists. Tests keep apart by the names of their models and experiments."""
    home = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("KSHOT_HOME", str(home))
        tracking.store()
    return home


@pytest.fixture
def project(shared_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the project at hand."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("KSHOT_HOME", str(shared_store))
    monkeypatch.setenv("KSHOT_USER", "ann")
    return shared_store


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server for every test that runs a flow: its start takes seconds, so there is one.

    In a process of its own, because in this one warnings are errors, and Prefect's server has some.
    """
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_LOGGING_TO_API_ENABLED,
        temporary_settings,
    )

    serve = "from kshot_flows.engine import api\nwith api(schedules=True) as url:\n    print(url, flush=True)\n    input()"
    server = subprocess.Popen(
        [sys.executable, "-c", serve], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env={**os.environ, "KSHOT_HOME": str(tmp_path_factory.mktemp("prefect"))},
    )  # fmt: skip
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    quiet = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_LOGGING_TO_API_ENABLED: False}
    with temporary_settings({PREFECT_API_URL: url, **quiet}):
        yield url
    server.communicate("\n", timeout=30)
