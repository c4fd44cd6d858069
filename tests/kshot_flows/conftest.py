"""What takes seconds and is made once: a real SQLite MLflow store, a real Prefect server, a data set to learn from."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from kshot_flows.tracking import stores


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder whose MLflow store exists. Tests keep apart by the names of their models and experiments."""
    home = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("KSHOT_HOME", str(home))
        stores.uri()
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

    serve = "from kshot_flows.run.embedded import api\nwith api() as url:\n    print(url, flush=True)\n    input()"
    server = subprocess.Popen(
        [sys.executable, "-c", serve], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env={**os.environ, "KSHOT_HOME": str(tmp_path_factory.mktemp("prefect"))},
    )  # fmt: skip
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    quiet = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_LOGGING_TO_API_ENABLED: False}
    with temporary_settings({PREFECT_API_URL: url, **quiet}):
        yield url
    server.kill()
    server.communicate()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3: moto's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


class MlflowServer(NamedTuple):
    """A server and the group of its processes."""

    uri: str
    group: int

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.group, number)


@pytest.fixture(scope="session")
def mlflow_server(shared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], MlflowServer]]:
    """Start MLflow's server, again where it was; its address stays."""
    folder, started = tmp_path_factory.mktemp("mlflow-server"), list[subprocess.Popen[bytes]]()
    shutil.copy(shared_store / "mlflow" / "mlflow.db", folder)  # saves making its tables
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts",
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

    def start() -> MlflowServer:
        with (folder / "log").open("a") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                break
            time.sleep(0.1)
        return MlflowServer(f"http://127.0.0.1:{port}", started[-1].pid)

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


TINY = """
name = "tiny"

[dataset]
name = "patterns"

[backbone]
name = "conv4"
width = 8

[learner]
name = "protonet"

[training]
ways = 5
shots = 1
queries = 3
steps = 40
lr = 3e-3
validate_every = 20
validation_ways = 3
validation_queries = 3
validation_episodes = 20

[evaluation]
ways = [3]
shots = [1]
queries = 3
episodes = 60
"""


@pytest.fixture(scope="session")
def draw() -> Callable[[Path, int], Path]:
    """Draw the pictures of a small data set, 16 x 16: a pattern for each class, under much noise."""

    def pictures(folder: Path, seed: int) -> Path:
        random = np.random.default_rng(seed)
        for split, classes in (("train", 10), ("val", 6), ("test", 6)):
            for name in range(classes):
                pattern = np.kron(random.integers(0, 256, (4, 4)), np.ones((4, 4)))  # (16, 16)
                place = folder / split / f"{split}-{name}"
                place.mkdir(parents=True)
                for number in range(8):
                    noisy = np.clip(pattern + random.normal(0, 100, (16, 16)), 0, 255).astype(np.uint8)
                    Image.fromarray(noisy).save(place / f"{number}.png")
        return folder

    return pictures


@pytest.fixture(scope="session")
def patterns(tmp_path_factory: pytest.TempPathFactory, draw: Callable[[Path, int], Path]) -> Path:
    """A data folder with one small data set."""
    from kshot.data.importing import finish, import_dataset

    pictures, root = draw(tmp_path_factory.mktemp("pictures"), 0), tmp_path_factory.mktemp("patterns") / "data"
    finish(import_dataset(str(pictures), "patterns", root, rule={"size": 16, "channels": 1}))
    return root


@pytest.fixture(scope="session")
def new_project(shared_store: Path, patterns: Path) -> Callable[[Path], Path]:
    """Make a folder a project: with the patterns as data, an MLflow store and a recipe that takes seconds."""

    def make(home: Path) -> Path:
        home.mkdir(parents=True, exist_ok=True)
        shutil.copytree(patterns, home / "data")
        (home / "mlflow").mkdir()
        shutil.copy(shared_store / "mlflow" / "mlflow.db", home / "mlflow")
        (home / "tiny.toml").write_text(TINY)
        return home

    return make
