"""The client as a distribution of its own: httpx and nothing of the server."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "core" / "kshot_client"
OURS = ("kshot", "kshot_runtime", "kshot_serve", "kshot_flows", "numpy", "PIL", "fastapi", "sqlalchemy", "onnxruntime")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, FOLDER]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [made] = folder.glob("*.whl")
    return made


def test_the_wheel_holds_the_package_and_needs_httpx(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as held:
        files = {file for file in held.namelist() if ".dist-info/" not in file}
        [metadata] = [file for file in held.namelist() if file.endswith("/METADATA")]
        needs = [line for line in held.read(metadata).decode().splitlines() if line.startswith("Requires-Dist")]
    assert files == {f"kshot_client/{file.name}" for file in FOLDER.iterdir() if file.suffix == ".py"} | {
        "kshot_client/py.typed"
    }
    assert needs == ["Requires-Dist: httpx>=0.28"]


def test_its_version_is_that_of_kshot() -> None:
    both = [tomllib.loads((folder / "pyproject.toml").read_text())["project"]["version"] for folder in (FOLDER, ROOT)]
    assert both[0] == both[1]


def test_it_runs_beside_httpx_alone(wheel: Path, tmp_path: Path) -> None:
    """In an environment with httpx only: what it does not find there it does not import."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    python = tmp_path / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "-c", ROOT / "constraints.txt"]
    done = subprocess.run([*pip, wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    code = (
        "import asyncio, sys; from kshot_client import AsyncClient, Client; Client().close(); "
        f"asyncio.run(AsyncClient().close()); print([name for name in {OURS} if name in sys.modules])"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
