"""A project with data sets in git and DVC, whose settings and state stay in the test's own folder."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kshot.data.importing import finish, import_dataset

PROJECT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, folder in (
        ("DVC_SITE_CACHE_DIR", "site"),
        ("DVC_GLOBAL_CONFIG_DIR", "global"),
        ("DVC_SYSTEM_CONFIG_DIR", "system"),
        ("HOME", "home"),
    ):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / folder))
    for variable in ("KSHOT_MIRROR", "KSHOT_DATA", "KSHOT_HOME", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(variable, raising=False)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "someone@example.org")


@pytest.fixture
def git() -> Callable[..., str]:
    def git(folder: Path, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout

    return git


@pytest.fixture
def dvc() -> Callable[..., None]:
    def dvc(folder: Path, *arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *arguments, "-q"], cwd=folder, check=True)

    return dvc


@pytest.fixture
def commit(git: Callable[..., str]) -> Callable[..., None]:
    def commit(folder: Path, why: str = "change") -> None:
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", why)

    return commit


@pytest.fixture
def project(tmp_path: Path, git: Callable[..., str], commit: Callable[..., None]) -> Path:
    """A repository set up as kshot's own is: its .dvc/, .dvcignore, .gitattributes and .gitignore."""
    project = tmp_path / "project"
    (project / ".dvc").mkdir(parents=True)
    git(project, "init", "-q", "-b", "main")
    for file in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitattributes", ".gitignore"):
        shutil.copy(PROJECT / file, project / file)
    commit(project, "start")
    return project


@pytest.fixture
def take() -> Callable[..., None]:
    """Import three classes of two images."""

    def take(root: Path, name: str = "zoo", seed: int = 0, size: int = 8, replace: bool = False) -> None:
        source, random = root.parent.parent / f"photos{seed}", np.random.default_rng(seed)
        for animal in ("ant", "bee", "cat"):
            (source / animal).mkdir(parents=True, exist_ok=True)
            for i in range(2):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(source / animal / f"{i}.png")
        finish(import_dataset(str(source), name, root, rule={"size": size}, replace=replace))

    return take


@pytest.fixture
def former() -> Callable[..., None]:
    """Record the folder as a whole, as kshot once did."""

    def former(root: Path) -> None:
        from dvc.repo import Repo

        from kshot.data.datasets import INDEX, data_sets, file_sha256

        repo = Repo(str(root.parent))
        repo.scm_context.quiet = True
        repo.add(str(root))
        repo.close()
        versions = "".join(f"    {name}: {file_sha256(root / name / INDEX)}\n" for name in data_sets(root))
        pointer = root.with_name("data.dvc")
        pointer.write_text(f"{pointer.read_text()}meta:\n  data sets:\n{versions}")

    return former


@pytest.fixture
def flip() -> Callable[[Path], None]:
    """Damage one byte of a data set's images, as a failing disk would: without a trace in the file's times."""

    def flip(folder: Path) -> None:
        import os

        images = folder / "images.npy"
        before, content = images.stat(), bytearray(images.read_bytes())
        content[-1] ^= 1
        images.write_bytes(content)
        os.utime(images, ns=(before.st_atime_ns, before.st_mtime_ns))

    return flip
