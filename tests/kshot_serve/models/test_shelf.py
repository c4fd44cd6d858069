"""The last good bundles on a disk that several workers share."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kshot_runtime.manifest import FileFacts
from kshot_serve.models.registry import RegisteredVersion
from kshot_serve.models.shelf import Shelf


def test_a_worker_that_was_slower_takes_what_another_fetched(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in review: it removed the folder, which the other had just begun to read, to put its own there."""
    sha256, rename, shelf = (
        FileFacts.of((bundles[0] / "bundle.json").read_bytes()).sha256,
        os.rename,
        tmp_path / "shelf",
    )

    class Copies:
        def download(self, version: RegisteredVersion, folder: Path) -> None:
            shutil.copytree(bundles[0], folder)

    def after_another(came: Path, there: Path) -> None:
        if not there.exists():
            shutil.copytree(bundles[0], there)
            (there / "whose").write_text("the other's")
        rename(came, there)

    monkeypatch.setattr("kshot_serve.models.shelf.os.rename", after_another)
    folder = Shelf(shelf).fetch(Copies(), RegisteredVersion("toy", "1", "", sha256))  # type: ignore[arg-type]
    assert (folder / "whose").read_text() == "the other's"
    assert [path.name for path in shelf.iterdir()] == [sha256[:16]]


def test_what_others_that_live_are_fetching_is_left_alone(tmp_path: Path) -> None:
    """Seen in review: a worker that took the place of a dead one removed what its fellows were downloading."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as alive:  # it ends with the block
        dead = subprocess.Popen(["true"])
        dead.wait()
        for pid in (dead.pid, os.getpid(), alive.pid):
            (tmp_path / f".incoming-{pid}-x").mkdir()
            (tmp_path / f".incoming-{pid}-last.json").touch()
        Shelf(tmp_path).tidy()
    left = {f".incoming-{alive.pid}-x", f".incoming-{alive.pid}-last.json"}
    assert {path.name for path in tmp_path.iterdir()} == left
