"""A real SQLite MLflow store, made once: its tables take seconds."""

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
