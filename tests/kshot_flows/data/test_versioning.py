"""Dataset versions: recorded, found again in clones and worktrees, pushed, pulled, rebuilt; and nothing lost."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kshot.datasets import ImageSet, data_sets
from kshot.importing import finish, import_dataset
from kshot_flows.data import versioning
from kshot_runtime.errors import KshotError

PROJECT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """DVC keeps state, and git looks for settings, outside the repository: here in tmp_path."""
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


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


def commit(folder: Path, why: str = "change") -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", why)


@pytest.fixture
def project(tmp_path):
    """A repository set up as kshot's own is: its .dvc/, .dvcignore and .gitignore."""
    project = tmp_path / "project"
    (project / ".dvc").mkdir(parents=True)
    git(project, "init", "-q", "-b", "main")
    for file in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore"):
        shutil.copy(PROJECT / file, project / file)
    commit(project, "start")
    return project


def photos(folder: Path, seed: int = 0) -> Path:
    """Three classes of two 8 x 8 images."""
    random = np.random.default_rng(seed)
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def take(root: Path, name: str = "zoo", seed: int = 0, **options) -> None:
    source = photos(root.parent.parent / f"photos{seed}", seed)
    finish(import_dataset(str(source), name, root, rule={"size": 8}, **options))


def test_a_version_is_recorded_once_and_changes_with_the_data(project):
    root = project / "data"
    take(root)
    first = versioning.version_data(root)
    assert first.md5.endswith(".dir")
    assert versioning.recorded(root) == first.md5
    assert versioning.version_data(root) == first
    take(root, "pets", seed=1)
    assert versioning.differences(root) == ["pets: not recorded"]
    second = versioning.version_data(root)
    assert second.md5 != first.md5
    assert versioning.differences(root) == []


def test_only_the_pointer_is_for_git_and_only_the_data_for_dvc(project):
    root = project / "data"
    take(root)
    versioning.version_data(root)
    assert git(project, "status", "--short").split() == ["??", "data.dvc"]
    assert "nfiles: 2" in (project / "data.dvc").read_text()  # no contact sheet, no locks


def test_a_users_own_repository_is_told_what_is_no_data(tmp_path):
    project = tmp_path / "theirs"
    project.mkdir()
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=project, check=True)
    (project / ".dvcignore").write_text("*.tmp")
    take(project / "data")
    first = versioning.version_data(project / "data")
    assert "nfiles: 2" in (project / "data.dvc").read_text()  # no contact sheet, no locks
    assert (project / ".dvcignore").read_text() == "*.tmp\n/data/*/sheet.png\n/data/.*\n"
    (project / "data" / ".downloads").mkdir()
    (project / "data" / ".downloads" / "half").write_text("")
    assert versioning.version_data(project / "data") == first
    assert (project / ".dvcignore").read_text().count("sheet.png") == 1


def test_the_pointer_keeps_what_its_users_wrote(project):
    root = project / "data"
    take(root)
    versioning.version_data(root)
    pointer = project / "data.dvc"
    pointer.write_text("# ours\n" + pointer.read_text() + "  asked by: Ann\n")
    take(root, "pets", seed=1)
    versioning.version_data(root)
    text = pointer.read_text()
    assert text.startswith("# ours\n")
    assert "asked by: Ann" in text
    assert ImageSet.open(root / "pets").version in text


def test_a_change_of_one_set_is_named(project):
    root = project / "data"
    take(root)
    take(root, "pets", seed=1)
    versioning.version_data(root)
    take(root, "pets", seed=2, replace=True)
    shutil.rmtree(root / "zoo")
    assert versioning.differences(root) == ["zoo: missing", "pets: changed"]


def test_a_clone_pulls_what_was_pushed(project, tmp_path):
    root = project / "data"
    take(root)
    recorded = versioning.version_data(root)
    subprocess.run(
        [sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "store", tmp_path / "store"], cwd=project, check=True
    )
    commit(project)
    assert versioning.push(root) == 3  # two files and the folder's list
    assert versioning.push(root) == 0
    git(tmp_path, "clone", "-q", "project", "clone")
    there = tmp_path / "clone" / "data"
    present = versioning.ensure("zoo", there)
    assert (present.how, present.same) == ("pulled", True)
    present.data_set.verify()
    assert versioning.version_data(there) == recorded
    assert git(tmp_path / "clone", "status", "--short") == ""


def test_a_pull_of_one_set_does_not_touch_another_that_was_never_recorded(project, tmp_path):
    test_a_clone_pulls_what_was_pushed(project, tmp_path)
    root = tmp_path / "clone" / "data"
    shutil.rmtree(root / "zoo")
    take(root, "mine", seed=3)
    assert versioning.ensure("zoo", root).how == "pulled"
    ImageSet.open(root / "mine").verify()


def test_a_whole_pull_never_removes_what_was_not_recorded(project, tmp_path):
    test_a_clone_pulls_what_was_pushed(project, tmp_path)
    root = tmp_path / "clone" / "data"
    take(root, "mine", seed=3)
    take(root, "zoo", seed=4, replace=True)
    mine, zoo = (ImageSet.open(root / name).version for name in ("mine", "zoo"))
    with pytest.raises(KshotError, match=r"no version records \(mine: not recorded; zoo: changed\)"):
        versioning.pull(root)
    assert ImageSet.open(root / "mine").version == mine
    assert ImageSet.open(root / "zoo").version == zoo


def test_a_clone_without_a_remote_builds_the_same_and_says_so(project, tmp_path, monkeypatch):
    mirror = tmp_path / "mirror" / "mnist"
    mirror.mkdir(parents=True)
    for part, pixels in (("t10k", bytes(range(196))), ("train", bytes(range(1, 197)))):
        (mirror / f"{part}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 28, 0, 0, 0, 28]) + pixels * 16
        )
        (mirror / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 4, 5, 5, 7, 7]))
    monkeypatch.setenv("KSHOT_MIRROR", str(mirror.parent))
    root = project / "data"
    assert versioning.ensure("mnist", root).how == "built"
    assert versioning.ensure("mnist", root).how == "was there"
    recorded = versioning.version_data(root)
    commit(project)
    git(tmp_path, "clone", "-q", "project", "clone")
    there = tmp_path / "clone" / "data"
    seen = []
    present = versioning.ensure("mnist", there, watch=seen.append)
    assert (present.how, present.same, present.note) == ("built", True, "")
    assert seen
    assert versioning.version_data(there) == recorded
    assert git(tmp_path / "clone", "status", "--short") == ""


def test_a_clone_that_builds_something_else_says_why(project, tmp_path, monkeypatch):
    test_a_clone_without_a_remote_builds_the_same_and_says_so(project, tmp_path, monkeypatch)
    (tmp_path / "mirror/mnist/t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 4, 5, 5, 8, 8]))
    git(tmp_path, "clone", "-q", "project", "third")
    present = versioning.ensure("mnist", tmp_path / "third" / "data")
    assert (present.how, present.same) == ("built", False)
    assert "not what the committed data.dvc names" in present.note
    assert "Pillow" in present.note


def test_a_set_that_can_neither_be_pulled_nor_built_says_both(project):
    root = project / "data"
    with pytest.raises(
        KshotError, match=r"'zoo' is not in .*data.dvc does not name it; and building it: there is no folder"
    ):
        versioning.ensure("zoo", root)
    take(root)
    versioning.version_data(root)
    shutil.rmtree(root / "zoo")
    with pytest.raises(KshotError, match="no DVC remote is configured"):
        versioning.ensure("zoo", root)


def test_a_git_worktree_is_a_project_of_its_own(project, tmp_path):
    root = project / "data"
    take(root)
    recorded = versioning.version_data(root)
    commit(project)
    git(project, "worktree", "add", "-q", str(tmp_path / "tree"))
    there = tmp_path / "tree" / "data"
    assert versioning.recorded(there) == recorded.md5
    take(there)
    assert versioning.version_data(there) == recorded


def test_outside_any_repository_data_works_and_its_version_says_why_it_is_missing(tmp_path):
    root = tmp_path / "bare" / "data"
    take(root)
    recorded = versioning.version_data(root)
    assert recorded.md5 is None
    assert "dvc init --no-scm" in recorded.why_not
    assert versioning.ensure("zoo", root).how == "was there"
    assert versioning.differences(root) == []
    with pytest.raises(KshotError, match="no DVC repository"):
        versioning.push(root)


def test_without_git_on_the_machine_data_are_used_and_versioned_all_the_same(tmp_path, monkeypatch):
    root = tmp_path / "plain" / "data"
    take(root)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=root.parent, check=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versioning.ensure("zoo", root).same is None
    assert versioning.version_data(root).md5


def test_in_git_without_dvc_the_way_to_start_is_told(tmp_path):
    git(tmp_path, "init", "-q", "plain")
    take(tmp_path / "plain" / "data")
    assert versioning.version_data(tmp_path / "plain" / "data").why_not.endswith("To start one: dvc init")


def test_dvc_without_git_versions_too(tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=folder, check=True)
    take(folder / "data")
    recorded = versioning.version_data(folder / "data")
    assert recorded.md5
    assert versioning.version_data(folder / "data") == recorded


def test_an_empty_data_folder_is_no_version(project):
    (project / "data").mkdir()
    with pytest.raises(KshotError, match="holds no data set yet"):
        versioning.version_data(project / "data")


def test_without_a_remote_push_and_pull_say_how_to_get_one(project):
    take(project / "data")
    versioning.version_data(project / "data")
    for move in (versioning.push, versioning.pull):
        with pytest.raises(KshotError, match="dvc remote add"):
            move(project / "data")


def test_several_processes_may_record_at_once(project):
    root = project / "data"
    take(root)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        recorded = pool.map(versioning.version_data, [root] * 6)
    assert len({r.md5 for r in recorded}) == 1
    assert all(r.md5 for r in recorded)


def test_the_data_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert versioning.data_root() == tmp_path / "data"
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path / "elsewhere"))
    assert versioning.data_root() == tmp_path / "elsewhere" / "data"
    monkeypatch.setenv("KSHOT_DATA", str(tmp_path / "big"))
    assert versioning.data_root() == tmp_path / "big"


def test_the_committed_pointer_of_this_project_names_glyphs_alone():
    text = (PROJECT / "data.dvc").read_text()
    if os.environ.get("CI") or not data_sets(PROJECT / "data"):  # elsewhere one's own data sets may be recorded too
        assert list(versioning._named_versions(text)) == ["glyphs"]
