"""A bundle as an MLflow model: in this process, from the registry, and behind `mlflow models serve`."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from kshot_flows import registry
from kshot_flows.tracking import runs, stores
from kshot_runtime.bundle import Bundle
from kshot_serve.pyfunc import FewShotModel, _load_pyfunc

DATA = runs.DataRef("colours", "f" * 64)


@pytest.fixture(scope="module")
def model(features_bundle: Path) -> FewShotModel:
    return _load_pyfunc(str(features_bundle), {"device": "cpu", "threads": 1})


def table(images: Sequence[object], labels: Sequence[str | None]) -> pd.DataFrame:
    return pd.DataFrame({"image": pd.Series(list(images), dtype=object), "label": list(labels)})


def test_photos_with_a_label_are_learned_from_and_the_others_are_answered_in_order(
    model: FewShotModel, photo: Callable[..., bytes], tmp_path: Path
) -> None:
    file = tmp_path / "blue.png"
    file.write_bytes(photo("blue", 7))
    rule = model._bundle.manifest.image
    green = np.full(rule.shape, 20, np.uint8)
    green[1] = 200
    photos = table(
        [photo("green", 5), photo("red"), file, photo("green"), base64.b64encode(photo("red", 3)).decode(), green],
        [None, "red", None, "green", None, ""],
    )
    photos.loc[6] = [photo("blue"), "blue"]
    answers = model.predict(photos)
    assert answers["class"].tolist() == ["green", "blue", "red", "green"]
    assert answers.index.tolist() == [0, 2, 4, 5]
    assert list(answers) == ["class", "probability", "unknown"]


def test_it_answers_as_a_bundle_does_whose_threshold_moves_with_accept(
    model: FewShotModel, photo: Callable[..., bytes]
) -> None:
    names = ["red", "green", "blue"]
    bundle = model._bundle
    red, grey = bundle.images([photo("red"), photo("grey")]).astype(float)
    queries = [(red + share * (grey - red)).astype(np.uint8) for share in np.linspace(0, 1, 30)]
    expected = bundle.classify(bundle.adapt([photo(name) for name in names], names), queries)
    photos = table([*map(photo, names), *queries], [*names, *[None] * len(queries)])
    answers = model.predict(photos, {"accept": None})
    assert answers["class"].tolist() == expected.names
    assert answers["probability"].to_numpy() == pytest.approx(expected.probabilities.max(1), abs=1e-6)
    assert (~answers["unknown"]).tolist() == expected.known.tolist()
    unknown = [int(model.predict(photos, {"accept": accept})["unknown"].sum()) for accept in (0.995, 0.9, 0.5)]
    assert unknown == sorted(unknown)
    assert unknown[0] < unknown[-1]


def test_a_single_class_is_told_from_all_else(model: FewShotModel, photo: Callable[..., bytes]) -> None:
    photos = table([photo("red"), photo("red", 1), photo("blue")], ["red", None, None])
    answers = model.predict(photos)
    assert answers["class"].tolist() == ["red", "red"]
    assert answers["unknown"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (["photo"], ["red"], "1 of 1 photos have a label: give one to the photos of each class"),
        (["photo", "photo"], [None, ""], "0 of 2 photos have a label"),
        ([b"\xffnothing", "photo"], ["red", None], "not an image in a format that is taken"),
        ([3, "photo"], ["red", None], "an image is bytes .* not 3"),
        (["/etc/hostname", "photo"], ["red", None], "an image is bytes .* not '/etc/hostname'"),  # no path: it is text
    ],
)
def test_what_cannot_be_answered_is_told_in_a_sentence(
    model: FewShotModel, photo: Callable[..., bytes], images: list[object], labels: list[str | None], message: str
) -> None:
    with pytest.raises(MlflowException, match=message):
        model.predict(table([photo("red") if image == "photo" else image for image in images], labels))


def test_a_registered_version_is_loaded_by_mlflow_and_answers_over_http(
    features_bundle: Path, photo: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path))
    with runs.run("colours", recipe={}, data=DATA, seed=1) as run:
        version = registry.register("colours", run.id, features_bundle, card="Tells colours apart.")
    registry.promote("colours", version, "production", force=True, why="to serve it")
    fetched = registry.fetch_bundle("colours", "production", tmp_path / "fetched")  # without what is MLflow's
    assert {file.name for file in fetched.iterdir()} == {file.name for file in features_bundle.iterdir()}
    assert Bundle.open(fetched).manifest == Bundle.open(features_bundle).manifest

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": stores.uri(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # where uvicorn is
    }
    command = ["mlflow", "models", "serve", "-m", "models:/colours@production", "--env-manager", "local"]
    with subprocess.Popen(
        [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as server:  # fmt: skip
        try:
            rows = [("red", "red"), ("green", "green"), ("green", None)]
            body = {
                "dataframe_split": {
                    "columns": ["image", "label"],
                    "data": [[base64.b64encode(photo(name, 2)).decode(), label] for name, label in rows],
                },
                "params": {"accept": 0.9},
            }
            answer = post(f"http://127.0.0.1:{port}/invocations", body)
            assert [row["class"] for row in answer.json()["predictions"]] == ["green"]
            refused = post(f"http://127.0.0.1:{port}/invocations", {"dataframe_records": [{"image": "aGVsbG8="}]})
            assert refused.status_code == 400
            assert "an image is bytes (or base64) of a photo" in refused.json()["message"]
            maps = [Path(f"/proc/{child}/maps").read_text() for child in group(server.pid)]
            assert any("onnxruntime" in each for each in maps)
            assert not any("libtorch" in each for each in maps)
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def post(url: str, body: object) -> httpx.Response:
    """The answer of a server, which may not listen yet."""
    until = time.monotonic() + 90
    while True:
        try:
            return httpx.post(url, json=body, timeout=30)
        except httpx.ConnectError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def group(leader: int) -> list[int]:
    """The processes of a process group."""
    return [
        int(found.name)
        for found in Path("/proc").iterdir()
        if found.name.isdecimal() and (found / "stat").exists() and os.getpgid(int(found.name)) == leader
    ]
