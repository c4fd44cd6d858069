"""The tree keeps the names of the libraries it uses free."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = {"mlflow", "onnx", "prefect", "dvc", "torch", "onnxruntime", "torchvision", "timm"}


def test_no_python_file_shadows_a_library():
    ours = ("bench", "core", "flows", "mlflow", "plugins", "tests")
    files = [p for folder in ours for p in (ROOT / folder).rglob("*.py")]
    assert files
    assert not [p for p in files if p.stem in LIBRARIES]
    assert not list((ROOT / "mlflow").rglob("*.py"))
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_top_level_holds_these_names_only():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {line.partition("/")[0] for line in listed.splitlines()}
    assert {name for name in names if not name.startswith(".")} == {
        "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "bench", "constraints.txt", "core",
        "data.dvc", "deploy", "docs", "flows", "mlflow", "plugins", "pyproject.toml", "tests",
    }  # fmt: skip


def test_mlflow_imported_at_the_root_is_the_library():
    code = "import mlflow; print(mlflow.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "site-packages" in out.stdout


def test_importing_kshot_sends_nothing_home(tmp_path):
    """stack.md 0.3: onnxruntime writes a device id into an empty home unless its telemetry is off before the import."""
    code = "import kshot_runtime, onnxruntime"
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    assert not list(tmp_path.rglob("*"))


def test_torchvision_imports_beside_a_cpu_build_of_torch():
    code = "from kshot.torchvision_import import torchvision; print(torchvision().models.resnet18().fc.in_features)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "512"
