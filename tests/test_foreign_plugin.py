"""The plugin of docs/plugins.md, installed by pip as a distribution of its own in an environment of its own."""

import os
import re
import site
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

from kshot import hookspecs

DOCS = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()

TEST = re.search(r"```python\n(import pytest\n.*?)```", DOCS, re.S)[1]  # type: ignore[index]

PIPELINE = """
import sys, torch
from pathlib import Path
from kshot.recipe import Recipe
from kshot.testing import toy_images
from kshot.training import Training, meta_train
torch.set_num_threads(1)
recipe = Recipe(name="x", dataset={"name": "toy"}, backbone={"name": "conv4", "width": 8}, learner={"name": "nearest"})
learner = recipe.build((1, 16, 16))
settings = Training(
    ways=5, queries=5, steps=30, lr=5e-3, validate_every=15, validation_episodes=5, validation_queries=5
)
for progress in meta_train(learner, toy_images(), toy_images(seed=1), settings, folder=Path(sys.argv[1]), seed=0):
    pass
print("trained", progress.step, progress.best > 0.4)
"""


def block(file: str) -> str:
    return re.search(rf"`{re.escape(file)}`\n\n```\w+\n(.*?)```", DOCS, re.S)[1]  # type: ignore[index]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """An environment that has the plugin, and everything else through a path to the present one."""
    folder = tmp_path_factory.mktemp("scratch")
    project = folder / "project"
    project.mkdir()
    for file in ("pyproject.toml", "kshot_nearest.py"):
        (project / file).write_text(block(file))
    (project / "test_nearest.py").write_text(TEST)
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    where = "import site; print(site.getsitepackages()[0])"
    inner = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    # addsitedir and not a plain path: an editable kshot is itself a .pth file
    (inner / "outer.pth").write_text(f"import site; site.addsitedir({site.getsitepackages()[0]!r})\n")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", project],
        check=True,
        capture_output=True,
    )
    return folder


def run(scratch: Path, *command: str | Path) -> str:
    python = scratch / "env" / "bin" / "python"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([python, *command], cwd=scratch / "project", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_is_listed_with_its_distribution_and_version(scratch):
    listing = run(scratch, "-c", "from kshot_flows.cli import main; main()", "algorithms")
    [line] = [line for line in listing.splitlines() if "kshot-nearest" in line]
    assert "nearest" in line
    assert "0.1.0" in line


def test_it_trains(scratch, tmp_path):
    assert run(scratch, "-c", PIPELINE, tmp_path).strip() == "trained 30 True"


def test_it_passes_the_conformance_kit_onnx_export_included(scratch):
    out = run(scratch, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_nearest.py")
    assert re.search(r"(\d+) passed", out)
    assert "onnx" in run(scratch, "-m", "pytest", "--collect-only", "-q", "test_nearest.py")


def test_hooks_and_their_documentation_are_tied_together():
    hooks = {name: value for name, value in vars(hookspecs).items() if name.startswith("kshot_")}
    assert hooks
    for name, hook in hooks.items():
        arguments = ", ".join(signature(hook).parameters)
        assert f"### {name}({arguments})\n" in DOCS
        assert hook.__doc__
    assert set(re.findall(r"### (kshot_\w+)\(", DOCS)) == set(hooks)
