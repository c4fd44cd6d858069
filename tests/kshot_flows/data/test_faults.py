"""Faults while data are imported and recorded: nothing is lost, nothing is half, and the next time is right."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kshot.data.datasets import ImageSet
from kshot_flows import recipes
from kshot_flows.data import versioning
from kshot_flows.data.pointer import Pointer
from kshot_flows.data.versioning import Recorded
from kshot_flows.tasks.data import version_data
from kshot_runtime.errors import KshotError


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file grows beyond this size: to a program that writes, the same as a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_stops_import_recording_and_push_and_afterwards_all_is_right(project, tmp_path, take):
    root = project / "data"
    with (project / ".dvc" / "config").open("a") as config:
        config.write(f"    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'store'}\n")
    room, size = 500_000, 256  # of the images' 1.2 MB
    take(root)
    versioning.record(root)
    named = (project / "data.dvc").read_text()
    with full_disk(room), pytest.raises(KshotError, match=r"data/pets was not written: .*Nothing of it was kept"):
        take(root, "pets", seed=1, size=size)
    assert not list(root.glob(".importing-*"))
    take(root, "pets", seed=1, size=size)
    with (
        full_disk(room),
        pytest.raises(
            KshotError, match=r"pets was not recorded: DVC's cache .* did not take .* \(.*too large.*images.npy"
        ),
    ):
        versioning.record(root)
    assert (project / "data.dvc").read_text() == named
    assert versioning.record(root) == Recorded(("pets",))
    with full_disk(room), pytest.raises(KshotError, match=r"store does not hold images.npy.* in full \(.*too large"):
        versioning.push(root)
    assert versioning.push(root) > 0
    assert versioning.push(root) == 0
    assert not [*tmp_path.glob("**/md5/*/.*.tmp")]  # of the halves that were written
    ImageSet.open(root / "pets").verify()


def test_a_full_disk_leaves_the_pointer_as_it_was(project, take):
    root = project / "data"
    take(root)
    versioning.record(root)
    pointer = Pointer.read(root)
    with full_disk(5), pytest.raises(OSError, match="too large"):
        pointer.changed({}, drop=["zoo"]).write()
    assert Pointer.read(root) == pointer
    assert not list(project.glob(".data.dvc.*"))


@pytest.mark.parametrize(
    "where",
    ["dvc.output.Output.commit", "kshot_flows.data.pointer.Pointer.write"],
    ids=["before the cache", "before the pointer"],
)
def test_a_recording_that_is_killed_is_done_by_the_next(project, take, where):
    root = project / "data"
    take(root)
    versioning.record(root)
    take(root, "pets", seed=1)
    owner, _, method = where.rpartition(".")
    module, _, name = owner.rpartition(".")
    killed = f"""
        import os, signal
        from pathlib import Path
        from {module} import {name}
        from kshot_flows.data import versioning
        {name}.{method} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        versioning.record(Path({str(root)!r}))
        """
    named = (project / "data.dvc").read_text()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(killed)])
    assert done.returncode == -signal.SIGKILL
    assert (project / "data.dvc").read_text() == named
    assert versioning.record(root) == Recorded(("pets",))
    assert versioning.state_of(root) == {"pets": "recorded", "zoo": "recorded"}


def test_an_import_that_is_ended_leaves_the_former_set_and_the_next_clears_up(project, take):
    root = project / "data"
    take(root)
    before = ImageSet.open(root / "zoo").version
    take(root, "other", seed=1)  # makes its photos
    ended = f"""
        import os, signal
        from pathlib import Path
        import kshot.data.importing as importing
        importing.contact_sheet = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
        photos, root = {str(root.parent.parent / "photos1")!r}, Path({str(root)!r})
        importing.finish(importing.import_dataset(photos, "zoo", root, replace=True))
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(ended)])
    assert done.returncode == -signal.SIGTERM
    assert versioning.verified("zoo", root).version == before
    take(root, "zoo", seed=1, replace=True)
    assert not list(root.glob(".importing-*"))
    assert versioning.verified("zoo", root).version != before


def test_a_clock_that_went_back_hides_no_change(project, take):
    root = project / "data"
    take(root)
    for file in (root / "zoo").iterdir():
        os.utime(file, (2_000_000_000, 2_000_000_000))
    versioning.record(root)
    take(root, "zoo", seed=1, replace=True)  # older by its times
    assert versioning.record(root) == Recorded(("zoo",), other=("zoo",))
    assert versioning.state_of(root) == {"zoo": "recorded"}


def test_a_folder_that_was_moved_is_the_same_project(project, tmp_path, take):
    take(project / "data")
    versioning.record(project / "data")
    project.rename(tmp_path / "moved")
    root = tmp_path / "moved" / "data"
    assert versioning.record(root) == Recorded()
    take(root, "pets", seed=1)
    assert versioning.record(root) == Recorded(("pets",))
    assert versioning.state_of(root) == {"pets": "recorded", "zoo": "recorded"}


def test_a_run_on_damaged_data_stops_before_anything_is_recorded_or_trained(
    tmp_path, new_project, monkeypatch, dvc, flip
):
    home = new_project(tmp_path / "home")
    monkeypatch.setenv("KSHOT_HOME", str(home))
    dvc(home, "init", "--no-scm")
    recipe = recipes.load(str(home / "tiny.toml"))
    data = version_data.fn(recipe)
    assert data.md5 == versioning.recorded(home / "data", "patterns")
    assert data.intact()
    flip(home / "data" / "patterns")
    named = (home / "data.dvc").read_text()
    assert not data.intact()
    with pytest.raises(KshotError, match=r"changed after the import. Import it again .* kshot data pull patterns"):
        version_data.fn(recipe)
    assert (home / "data.dvc").read_text() == named
    versioning.pull(home / "data")
    assert data.intact()
    assert version_data.fn(recipe) == data
