"""The same registry through a real MLflow server with our settings: versions are text there, artifacts travel."""

import itertools
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from kshot_flows import registry
from kshot_flows.cli.errors import sentence
from kshot_flows.registry.gate import Check, GateReport
from kshot_flows.registry.log import StageConflictError
from kshot_flows.tracking import runs, stores
from kshot_runtime.errors import KshotError

SETTINGS = Path(__file__).parents[3] / "mlflow"


@pytest.fixture
def server(shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    (tmp_path / "mlflow" / "server").mkdir(parents=True)
    shutil.copy(shared_store / "mlflow" / "mlflow.db", tmp_path / "mlflow" / "server")  # saves making its tables
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines = (SETTINGS / "server.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    environment = {**os.environ, **settings, "MLFLOW_PORT": str(port)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "mlflow", "server"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("KSHOT_USER", "ann")
        yield process
    finally:
        stop(process)


def stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)  # its workers too
        server.wait(timeout=30)


RACER = """
import sys
from kshot_flows import registry
version = int(sys.argv[1])
registry.champion("toy"); print("ready", flush=True); sys.stdin.readline()
for _ in range(3):
    try:
        registry.move("toy", version, "production", why="race", expect=registry.champion("toy"))
    except registry.StageConflictError as error:
        assert "was expected in Production" in str(error)
"""


def test_register_move_race_roll_back_trace_and_fetch_through_a_server_and_when_it_is_gone(
    server: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = runs.DataRef("toy", "f" * 64, "0" * 32 + ".dir")
    for content in "abc":
        bundle = tmp_path / content
        bundle.mkdir()
        for file in ("adapt.onnx", "classify.onnx", "bundle.json"):
            (bundle / file).write_text(content)
        with runs.run("toy", recipe={"lr": 0.1}, data=data, seed=1) as run:
            run.metrics(1, {"loss": 0.5})
            registry.register("toy", run.id, bundle, tags={"accuracy": "0.9"})
    assert [version.version for version in registry.versions("toy")] == [3, 2, 1]

    check = Check("accuracy", True, 0.9, 0.8, "good enough")
    registry.record_gate("toy", 1, GateReport(1, None, 100, 0.9, 0.01, None, (check,)).to_dict())
    registry.promote("toy", 1, "production", why="first")
    registry.move("toy", 2, "production", why="better", who="bob", expect=1)
    with pytest.raises(StageConflictError, match="by bob"):
        registry.move("toy", 3, "production", why="late", expect=1)

    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, version], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for version in "13"
    ]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
    for racer in racers:
        racer.communicate("go\n", timeout=120)
    assert [racer.returncode for racer in racers] == [0, 0]
    moves = registry.history("toy")
    for before, after in itertools.pairwise(moves):
        assert before.version == (after.displaced or after.version)
    assert registry.champion("toy") == moves[-1].version
    assert registry.disagreements("toy") == []
    assert [v.version for v in registry.versions("toy") if v.stage == "Production"] == [moves[-1].version]
    assert [v.version for v in registry.versions("toy") if "production" in v.aliases] == [moves[-1].version]

    back = registry.rollback("toy", why="worse")
    assert registry.trace("toy", back.version).history[-1] == back
    facts = registry.trace("toy", 1).facts
    assert facts["data (DVC)"] == data.md5
    assert facts["gate"].startswith("passed runs:/")
    fetched = registry.fetch_bundle("toy", "production", tmp_path / "fetched")
    assert (fetched / "adapt.onnx").read_text() == "abc"[back.version - 1]
    assert list((tmp_path / "mlflow" / "server" / "artifacts").rglob("adapt.onnx"))  # where server.env says

    stores.client().set_registered_model_alias("toy", "production", "2")  # by another client
    assert registry.settle("toy") == [
        "version 2 of toy is in production now: the alias production was set to it; it was recorded"
    ]
    assert (registry.champion("toy"), registry.disagreements("toy")) == (2, [])

    stop(server)
    began = time.monotonic()
    monkeypatch.setattr(stores, "_FRESH", math.inf)  # it ended in the middle of a command
    with pytest.raises(MlflowException) as error:
        registry.promote("toy", 1, "staging")
    assert re.fullmatch(r"MLflow at http://\S+ does not answer \(.*\)\..*", sentence(error.value))
    for command in (["models"], ["promote", "toy", "1", "staging"]):
        entry = "from kshot_flows.cli.main import main; main()"
        told = subprocess.run([sys.executable, "-c", entry, *command], capture_output=True, text=True)
        assert told.returncode == 1
        assert re.fullmatch(r"no MLflow server answers at http://\S+ \(.*refused\)\. Start it as .*\n", told.stderr)
    assert time.monotonic() - began < 60


def test_a_server_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(KshotError, match=r"no MLflow server answers at http://user:\*\*\*@127\.0\.0\.1:9 .*refused"):
        stores.uri()


def test_the_folder_named_after_the_package_holds_no_python() -> None:
    assert list(SETTINGS.glob("*.py")) == []
