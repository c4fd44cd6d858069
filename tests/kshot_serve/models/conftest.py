"""A server's champions and engine without the rest; a project with a real registry; a real MLflow server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from kshot_flows import registry
from kshot_flows.tracking import runs, stores
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champions import Champions
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import Settings

Remake = Callable[[Path, Path, Callable[[onnx.GraphProto], None]], Path]

SIDE = 16
MLFLOW = Path(__file__).parents[3] / "mlflow"


class World:
    """A server's champions and engine, as the application has them."""

    def __init__(self, source: str, folder: Path, address: str = "", **settings: Any) -> None:
        self.metrics = Metrics()
        self.settings = Settings(
            source=source, folder=folder, registry=address, **{"poll_s": 3600, "engine": {"threads": 1}} | settings
        )
        self.engine = Engine(self.settings.engine, self.metrics)
        self.champions = Champions(self.settings, self.engine.open, self.metrics)

    async def __aenter__(self) -> World:
        await self.engine.start()
        try:
            await self.champions.start()
        except BaseException:
            await self.engine.stop()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.champions.stop()
        await self.engine.stop()

    def metric(self, name: str, /, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    @property
    def version(self) -> str:
        return self.champions.current.version

    async def sound(self) -> None:
        """The champion answers."""
        champion = self.champions.current
        assert (await self.engine.embed(champion, np.zeros((2, 3, SIDE, SIDE), np.uint8))).shape == (
            2,
            champion.bundle.manifest.features,
        )


@pytest.fixture(scope="session")
def new_world() -> type[World]:
    """new_world(source, folder, address="", **settings): a context with champions that have started."""
    return World


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a real SQLite registry. Tests keep apart by the names of their models."""
    home = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("KSHOT_HOME", str(home))
        stores.uri()
    return home


class Shop:
    """Registers bundles and promotes them, by the commands' own functions."""

    def __init__(self, address: str, name: str) -> None:
        self.address, self.name, self.source = address, name, f"models:/{name}@production"

    def register(self, bundle: Path) -> int:
        with runs.run(self.name, recipe={"lr": 0.1}, data=runs.DataRef("toy", "f" * 64), seed=1) as made:
            return registry.register(self.name, made.id, bundle)

    def promote(self, version: int) -> None:
        registry.move(self.name, version, "production", why="test")

    def sell(self, bundle: Path) -> str:
        self.promote(version := self.register(bundle))
        return str(version)

    def artifacts(self, version: int) -> Path:
        """Where the store keeps the files of a version."""
        found = stores.client().get_model_version(self.name, str(version))
        return Path(found.source.removeprefix("file://"))


@pytest.fixture(scope="session")
def new_shop() -> type[Shop]:
    """new_shop(address, name): what registers and promotes bundles there."""
    return Shop


@pytest.fixture
def shop(store: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Shop:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("KSHOT_HOME", str(store))
    monkeypatch.setenv("KSHOT_USER", "ann")
    return Shop(f"sqlite:///{store / 'mlflow' / 'mlflow.db'}", f"toy-{abs(hash(request.node.nodeid))}")


def _times(factor: float) -> Callable[[onnx.GraphProto], None]:
    """Features so many times as large: another model, told apart by what it gives."""

    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), "factor"))
        graph.node.append(helper.make_node("Mul", ["plain", "factor"], ["features"]))

    return change


@pytest.fixture(scope="session")
def bundles(features_bundle: Path, remake: Remake, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four models: the features of the second are twice those of the first, and so on."""
    folder = tmp_path_factory.mktemp("champions")
    return [features_bundle] + [remake(features_bundle, folder / str(n), _times(n)) for n in (2, 3, 4)]


class MLflowServer:
    """A real MLflow server with the project's settings, that can be stopped and started again."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.home, self.address = home, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        lines = (MLFLOW / "server.env").read_text().splitlines()
        settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
        environment = {**os.environ, **settings, "MLFLOW_PORT": str(self.port)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.home / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server"],
                env=environment, cwd=self.home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        for _ in range(240):
            assert self.process.poll() is None, (self.home / "server.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.25)

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGTERM)  # its workers too
            self.process.wait(timeout=30)
            self.process = None


@pytest.fixture
def mlflow_server(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MLflowServer]:
    (tmp_path / "mlflow" / "server").mkdir(parents=True)
    shutil.copy(store / "mlflow" / "mlflow.db", tmp_path / "mlflow" / "server")  # saves making its tables
    server = MLflowServer(tmp_path)
    try:
        server.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        yield server
    finally:
        server.stop()
