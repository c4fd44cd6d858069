"""A serving host: kshot with its base dependencies and nothing else, in an environment of its own, serves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ("torch", "torchvision", "mlflow", "prefect", "dvc", "onnx")

# Python's own word for a pickle that calls something by its name (PEP 578). No Python code can get around the hook.
WATCH = """
import sys

def watch(event, arguments):
    if event == "pickle.find_class":
        raise SystemExit(f"something was unpickled: {arguments}")

sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment, with what `pip install .` puts there, and a watch on pickles."""
    folder = tmp_path_factory.mktemp("base")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    here = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", here, "install", "--quiet", "--no-compile"]
    done = subprocess.run([*pip, "-c", ROOT / "constraints.txt", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "watch.pth").write_text("import watch\n")
    (packages / "watch.py").write_text(WATCH)
    return here


def run(python: Path, code: str) -> subprocess.CompletedProcess[str]:
    away = python.parent  # -c looks for modules in the current folder, and this project has one named mlflow
    return subprocess.run([python, "-c", code], cwd=away, env=environment(), capture_output=True, text=True)


def environment() -> dict[str, str]:
    """The present one, without what would point at other servers or other packages."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("KSHOT", "MLFLOW", "PYTHON"))}
    return ours | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def http(python: Path, features_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """`kshot serve` as a process of that environment, in an empty folder."""
    folder = tmp_path_factory.mktemp("host")
    bundle = shutil.copytree(features_bundle, folder / "bundle")
    with (
        (folder / "log").open("w+") as log,
        subprocess.Popen(
            [python.parent / "kshot", "serve", bundle, "--port", "0"],
            cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            told = re.search(r"http://\S+", process.stdout.readline())
            assert told, (folder / "log").read_text()[-3000:]
            with httpx.Client(base_url=told[0], timeout=60) as client:
                yield client
        finally:
            process.terminate()
            ended = process.wait(30)
        assert ended == 0, (folder / "log").read_text()[-3000:]


def test_what_trains_is_not_there(python: Path) -> None:
    found = run(python, f"from importlib.util import find_spec; print([n for n in {ABSENT} if find_spec(n)])")
    assert found.stdout.strip() == "[]", found.stderr


def test_a_class_is_added_and_a_photo_classified(http: httpx.Client, photo: Callable[..., bytes]) -> None:
    space = "/v1/spaces/" + http.post("/v1/spaces", json={"name": "colours"}).json()["id"]
    for colour in ("red", "green"):
        photos = [("photos", photo(colour, shade)) for shade in (1, 2)]
        assert http.post(f"{space}/classes", data={"name": colour}, files=photos).status_code == 201
    answer = http.post(f"{space}/classify", content=photo("green", 3), headers={"content-type": "image/png"}).json()
    assert answer["results"][0]["class"]["name"] == "green"


def test_a_label_space_travels_and_comes_back(http: httpx.Client) -> None:
    [space] = http.get("/v1/spaces").json()["spaces"]
    exported = http.get(f"/v1/spaces/{space['id']}/export").content
    http.delete(f"/v1/spaces/{space['id']}").raise_for_status()
    came = http.post("/v1/spaces/import", content=exported, headers={"content-type": "application/zip"})
    assert (came.status_code, came.json()["photos"]) == (201, 4)


def test_what_is_unpickled_would_be_noticed(python: Path) -> None:
    """A pickle that the server above had loaded would have failed its request, or ended it with another code."""
    found = run(python, "import pickle, decimal; pickle.loads(pickle.dumps(decimal.Decimal))")
    assert "something was unpickled" in found.stderr


def test_following_a_registry_says_what_to_install(python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [python.parent / "kshot", "serve", "models:/pets@production", "--port", "0"],
        cwd=tmp_path, env=environment() | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "kshot[registry]" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
