"""What `kshot plugin new` writes, installed and used by the commands of its README in an environment of its own."""

import os
import re
import shlex
import site
import subprocess
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kshot import hookspecs, testing
from kshot.data.datasets import ClassImages
from kshot_flows.plugins import project as plugin_project
from kshot_runtime.bundle import Bundle

DOCS = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()

COMMANDS = {
    "kshot": "from kshot_flows.cli.main import main",
    "pip": "from pip._internal.cli.main import main",
    "pytest": "from pytest import main",
}

# For `kshot run`: a small data set and a short training, in the place of the recipe's.
SMALL = shlex.split("""
    dataset.name=patterns training.ways=5 training.steps=30 training.lr=5e-3 training.validate_every=15
    training.validation_ways=3 training.validation_episodes=10 evaluation.ways=[3] evaluation.shots=[1]
    evaluation.episodes=40
""")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The new plugin's folder, beside an environment that sees everything else through a path to the present one."""
    folder = tmp_path_factory.mktemp("foreign")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    binaries = folder / "env" / "bin"
    where = "import site; print(site.getsitepackages()[0])"
    inner = subprocess.run([binaries / "python", "-c", where], check=True, capture_output=True, text=True).stdout
    # addsitedir and not a plain path: an editable kshot is itself a .pth file
    (Path(inner.strip()) / "outer.pth").write_text(f"import site; site.addsitedir({site.getsitepackages()[0]!r})\n")
    for command, its_main in COMMANDS.items():
        (binaries / command).write_text(f"#!{binaries / 'python'}\nimport sys\n{its_main}\nsys.exit(main())\n")
        (binaries / command).chmod(0o755)
    run(folder, "kshot plugin new nearest")
    run(folder / "nearest", readme(folder, "pip"))
    return folder / "nearest"


def readme(folder: Path, start: str) -> str:
    """The command of the plugin's README that begins so."""
    [command] = [line for line in plugin_project.commands(folder / "nearest") if line.startswith(start)]
    return command


def run(folder: Path, command: str, *more: str) -> str:
    """Run a command of the environment beside or in `folder`, as a user would."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("KSHOT_", "MLFLOW_", "PREFECT_"))}
    env |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    env |= {
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_NO_INDEX": "1",
    }  # all that it needs is here (0 means that there is none)
    [env_folder] = [place / "env" for place in (folder, folder.parent) if (place / "env").is_dir()]
    name, *arguments = shlex.split(command)
    done = subprocess.run(
        [env_folder / "bin" / name, *arguments, *more], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_is_listed_with_its_distribution_and_version(project: Path) -> None:
    [line] = [line for line in run(project, "kshot algorithms").splitlines() if "kshot-nearest" in line]
    assert "0.1.0" in line
    assert "by cosine similarity" in line
    assert "logits per unit of cosine similarity" in run(project, readme(project.parent, "kshot algorithms"))


def test_it_keeps_every_promise(project: Path) -> None:
    out = run(project, readme(project.parent, "kshot plugin check"))
    assert out.count("passed") == len(testing.CHECKS)
    assert f"nearest keeps all {len(testing.CHECKS)} promises." in out


def test_its_own_tests_pass(project: Path) -> None:
    assert f"{len(testing.CHECKS) + 1} passed" in run(project, readme(project.parent, "pytest"))


def test_its_recipe_takes_it_to_production_and_its_bundle_classifies(project: Path) -> None:
    save(testing.toy_images(classes=18, images=8), project / "pictures")
    run(project, "kshot data import pictures patterns --size 16 --split 0.5/0.25/0.25")
    out = run(project, readme(project.parent, "kshot run"), *SMALL)
    assert "nearest version 1 is in production." in out, out
    [manifest] = project.glob("runs/nearest/*/bundle-*/bundle.json")
    bundle, photos = Bundle.open(manifest.parent), [project / "pictures" / name / "0.png" for name in "012"]
    state = bundle.adapt(photos, ["a", "b", "c"])
    assert list(bundle.classify(state, photos).names) == ["a", "b", "c"]  # each is its own class's mean


def save(images: ClassImages, folder: Path) -> None:
    """Write images as a user has them: a folder for each class."""
    for which, name in enumerate(images.names):
        (folder / name).mkdir(parents=True)
        for number in range(images.counts[which]):
            [pixels] = images.gather(np.array([which]), np.array([number]))  # (1, 16, 16)
            Image.fromarray(pixels[0]).save(folder / name / f"{number}.png")


def test_the_docs_show_the_very_file_that_is_written() -> None:
    shown = re.search(r"`kshot_nearest.py`\n\n```python\n(.*?)```", DOCS, re.S)
    assert shown
    assert shown[1] == (plugin_project.STARTER / "kshot_nearest.py").read_text()
    tests = re.search(r"```python\n(@pytest.mark.*?)```", DOCS, re.S)
    assert tests
    assert tests[1] in (plugin_project.STARTER / "test_nearest.py").read_text()


def test_hooks_and_their_documentation_are_tied_together() -> None:
    hooks = {name: value for name, value in vars(hookspecs).items() if name.startswith("kshot_")}
    assert hooks
    for name, hook in hooks.items():
        arguments = ", ".join(signature(hook).parameters)
        assert f"### {name}({arguments})\n" in DOCS
        assert hook.__doc__
    assert set(re.findall(r"### (kshot_\w+)\(", DOCS)) == set(hooks)
