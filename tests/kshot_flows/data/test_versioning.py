"""Versions of data sets: recorded, found again in clones and worktrees, rebuilt; and nothing dropped or damaged."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from kshot.data.datasets import ImageSet, data_sets
from kshot_flows.data import versioning
from kshot_flows.data.pointer import Pointer
from kshot_flows.data.versioning import Recorded
from kshot_runtime.errors import KshotError

PROJECT = Path(__file__).parents[3]


def test_a_data_set_is_recorded_once_and_apart_from_others(project, take):
    root = project / "data"
    take(root)
    assert versioning.record(root) == Recorded(("zoo",))
    zoo = versioning.recorded(root, "zoo")
    assert zoo.endswith(".dir")
    assert versioning.record(root, "zoo") == Recorded()
    take(root, "pets", seed=1)
    assert versioning.state_of(root) == {"pets": "not recorded", "zoo": "recorded"}
    assert versioning.record(root) == Recorded(("pets",))
    assert versioning.recorded(root, "pets") != versioning.recorded(root, "zoo") == zoo
    take(root, "pets", seed=2, replace=True)
    shutil.rmtree(root / "zoo")
    assert versioning.state_of(root) == {"pets": "changed", "zoo": "missing"}


def test_only_the_pointer_is_for_git_and_only_the_data_for_dvc(project, git, dvc, take):
    root = project / "data"
    take(root)
    versioning.record(root)
    assert git(project, "status", "--short").split() == ["??", "data.dvc"]
    assert "nfiles: 2" in (project / "data.dvc").read_text()  # no contact sheet, no locks
    before = (project / "data.dvc").read_text()
    dvc(project, "commit", "--force", "data.dvc")  # DVC reads it, finds the same, and leaves it as it is
    assert (project / "data.dvc").read_text() == before


def test_a_users_own_repository_learns_what_is_no_data_and_how_data_merge(tmp_path, git, dvc, take):
    project = tmp_path / "theirs"
    project.mkdir()
    git(project, "init", "-q")
    dvc(project, "init")
    (project / ".dvcignore").write_text("*.tmp")
    take(project / "data")
    versioning.record(project / "data")
    assert "nfiles: 2" in (project / "data.dvc").read_text()
    assert (project / ".dvcignore").read_text() == "*.tmp\n/data/.*\n/data/*/sheet.png\n"
    assert (project / ".gitattributes").read_text() == "/data.dvc merge=union\n"
    assert (project / ".gitignore").read_text() == "/data\n"
    take(project / "data", "pets", seed=1)
    versioning.record(project / "data")
    assert (project / ".dvcignore").read_text().count("sheet.png") == 1


def test_the_pointer_keeps_what_its_users_wrote(project, dvc, take):
    root, pointer = project / "data", project / "data.dvc"
    take(root)
    versioning.record(root)
    text = pointer.read_text().replace("  hash: md5", "  desc: all of them\n  hash: md5")
    pointer.write_text(f"# ours\n{text}meta:\n  asked by: Ann\n")
    take(root, "zoo", seed=1, replace=True)
    take(root, "pets", seed=1)
    assert versioning.record(root).lines(root) == [
        "recorded in data.dvc: pets, zoo",
        "data.dvc named another version of zoo; back to that: git checkout data.dvc; kshot data pull zoo",
    ]
    text = pointer.read_text()
    assert text.startswith("# ours\nouts:\n- path: data/pets\n")
    assert text.endswith("  desc: all of them\n  hash: md5  # zoo\nmeta:\n  asked by: Ann\n")
    assert ImageSet.open(root / "zoo").version in text
    dvc(project, "status", "data.dvc")


def test_what_is_recorded_was_verified_and_a_pull_mends_it(project, take, flip):
    root = project / "data"
    take(root)
    take(root, "new", seed=1)
    versioning.record(root, "zoo")
    named = (project / "data.dvc").read_text()
    flip(root / "zoo")
    flip(root / "new")
    for name in ("zoo", "new"):
        with pytest.raises(
            KshotError, match=rf"{name}/images.npy has sha256 .* Import it again .* kshot data pull {name}"
        ):
            versioning.record(root, name)
        with pytest.raises(KshotError, match="changed after the import"):
            versioning.ensure(name, root)
    assert (project / "data.dvc").read_text() == named
    assert versioning.state_of(root) == {"new": "damaged", "zoo": "damaged"}
    assert versioning.pull(root) == ["zoo"]  # from DVC's cache, without a remote
    assert versioning.pull(root) == []
    assert versioning.ensure("zoo", root).data_set.version in named


def test_a_torn_set_stops_a_run_and_one_that_a_killed_pull_left_half_is_brought_again(project, take):
    root = project / "data"
    take(root)
    versioning.record(root)
    images = root / "zoo" / "images.npy"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(KshotError, match=r"images.npy is missing or damaged. .* kshot data pull zoo"):
        versioning.ensure("zoo", root)
    assert versioning.pull(root) == ["zoo"]
    for half in (images, root / "zoo" / "index.json"):
        half.unlink()
        assert versioning.ensure("zoo", root).how == "pulled"


def test_a_set_that_is_not_here_stays_recorded_until_it_is_removed_on_purpose(project, take):
    root = project / "data"
    take(root)
    take(root, "pets", seed=1)
    versioning.record(root)
    shutil.rmtree(root / "zoo")
    take(root, "ants", seed=2)
    versioning.record(root)
    assert list(Pointer.read(root).sets) == ["ants", "pets", "zoo"]
    with pytest.raises(KshotError, match="does not name goats; it names: ants, pets, zoo"):
        versioning.remove(root, "goats")
    versioning.remove(root, "zoo", "pets")
    assert versioning.state_of(root) == {"ants": "recorded", "pets": "not recorded"}
    ImageSet.open(root / "pets").verify()


def test_a_pointer_of_the_former_form_is_rewritten_when_something_is_recorded(
    project, tmp_path, git, commit, take, former
):
    root = project / "data"
    take(root)
    take(root, "pets", seed=1)
    former(root)
    commit(project)
    folder = versioning.recorded(root, "zoo")
    assert versioning.state_of(root) == {"pets": "recorded", "zoo": "recorded"}
    assert versioning.record(root, "zoo", "pets") == Recorded()  # nothing is new, so it stays as it is
    zoo = Pointer.read(root).sets["zoo"].version
    shutil.rmtree(root / "zoo")  # its part is taken from the list of the folder's files
    take(root, "ants", seed=2)
    assert versioning.record(root) == Recorded(("ants",), split=True)
    pointer = Pointer.read(root)
    assert list(pointer.sets) == ["ants", "pets", "zoo"]
    assert not pointer.former
    assert "data sets" not in pointer.text
    assert pointer.sets["zoo"].version == zoo
    assert pointer.sets["zoo"].md5 != folder
    assert versioning.pull(root) == ["zoo"]
    assert ImageSet.open(root / "zoo").version == zoo
    git(project, "checkout", "data.dvc")
    assert versioning.record(root) == Recorded(("ants",), split=True)
    git(project, "checkout", "data.dvc")
    shutil.rmtree(root / "zoo")
    assert versioning.pull(root, "zoo") == ["zoo"]  # an old commit's data come back as ever
    versioning.remove(root, "pets")
    assert list(Pointer.read(root).sets) == ["zoo"]


def test_a_set_of_the_former_form_that_nobody_has_is_not_dropped(project, tmp_path, git, commit, take, former):
    root = project / "data"
    take(root)
    take(root, "pets", seed=1)
    former(root)
    commit(project)
    git(tmp_path, "clone", "-q", "project", "clone")
    root = tmp_path / "clone" / "data"
    take(root)
    assert versioning.record(root, "zoo") == Recorded()
    take(root, "ants", seed=2)
    with pytest.raises(KshotError, match=r"with pets in it, .*no DVC remote .* kshot data remove pets"):
        versioning.record(root, "ants")
    versioning.remove(root, "pets")
    versioning.record(root, "ants")
    assert list(Pointer.read(root).sets) == ["ants", "zoo"]


def test_a_pointer_that_cannot_be_read_is_an_error_and_not_taken_for_an_empty_one(project, take):
    root = project / "data"
    take(root)
    (project / "data.dvc").write_text("outs:\n<<<<<<< HEAD\n- path: data/zoo\n")
    with pytest.raises(KshotError, match=r"data.dvc cannot be read .* git checkout --theirs data.dvc"):
        versioning.record(root)


def test_a_clone_without_a_remote_builds_the_same_and_says_so(project, tmp_path, monkeypatch, git, commit):
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
    versioning.record(root)
    commit(project)
    git(tmp_path, "clone", "-q", "project", "clone")
    there = tmp_path / "clone" / "data"
    seen = []
    present = versioning.ensure("mnist", there, watch=seen.append)
    assert (present.how, present.same, present.note) == ("built", True, "")
    assert seen
    assert versioning.record(there) == Recorded()
    assert git(tmp_path / "clone", "status", "--short") == ""

    (mirror / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 4, 5, 5, 8, 8]))
    git(tmp_path, "clone", "-q", "project", "third")
    present = versioning.ensure("mnist", tmp_path / "third" / "data")
    assert (present.how, present.same) == ("built", False)
    assert "not what the committed data.dvc names" in present.note
    assert "Pillow" in present.note


def test_a_set_that_can_neither_be_pulled_nor_built_says_both(project, take):
    root = project / "data"
    with pytest.raises(
        KshotError, match=r"'zoo' is not in .*data.dvc does not name it; and building it: there is no folder"
    ):
        versioning.ensure("zoo", root)
    take(root)
    versioning.record(root)
    shutil.rmtree(root / "zoo")
    shutil.rmtree(project / ".dvc" / "cache")
    with pytest.raises(KshotError, match=r"no DVC remote is configured.* and building it"):
        versioning.ensure("zoo", root)


def test_a_git_worktree_is_a_project_of_its_own(project, tmp_path, git, commit, take):
    root = project / "data"
    take(root)
    versioning.record(root)
    commit(project)
    git(project, "worktree", "add", "-q", str(tmp_path / "tree"))
    there = tmp_path / "tree" / "data"
    assert versioning.recorded(there, "zoo") == versioning.recorded(root, "zoo")
    take(there)
    assert versioning.record(there) == Recorded()


def test_outside_any_repository_data_works_and_its_version_says_why_it_is_missing(tmp_path, take):
    root = tmp_path / "bare" / "data"
    take(root)
    assert "dvc init --no-scm" in versioning.why_not_versioned(root)
    assert versioning.recorded(root, "zoo") is None
    assert versioning.ensure("zoo", root).how == "was there"
    for act in (versioning.record, versioning.push, versioning.pull, versioning.remove):
        with pytest.raises(KshotError, match="no DVC repository"):
            act(root)


def test_in_git_without_dvc_the_way_to_start_is_told(tmp_path, git):
    git(tmp_path, "init", "-q", "plain")
    assert versioning.why_not_versioned(tmp_path / "plain" / "data").endswith("To start one: dvc init")


def test_without_git_on_the_machine_data_are_used_and_versioned_all_the_same(tmp_path, monkeypatch, take, dvc):
    root = tmp_path / "plain" / "data"
    take(root)
    dvc(root.parent, "init", "--no-scm")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versioning.ensure("zoo", root).same is None
    versioning.record(root)
    assert versioning.recorded(root, "zoo")
    assert not (root.parent / ".gitattributes").exists()


def test_an_empty_data_folder_is_no_version(project):
    (project / "data").mkdir()
    with pytest.raises(KshotError, match="holds no data set yet"):
        versioning.record(project / "data")


def test_several_processes_record_different_sets_at_once(project, take):
    root = project / "data"
    names = ["ants", "bees", "cats", "dogs"]
    for seed, name in enumerate(names):
        take(root, name, seed=seed)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(versioning.record, [(root, name) for name in names])
    assert versioning.state_of(root) == dict.fromkeys(names, "recorded")


def test_the_data_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert versioning.data_root() == tmp_path / "data"
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path / "elsewhere"))
    assert versioning.data_root() == tmp_path / "elsewhere" / "data"
    monkeypatch.setenv("KSHOT_DATA", str(tmp_path / "big"))
    assert versioning.data_root() == tmp_path / "big"


def test_the_committed_pointer_of_this_project_names_glyphs_alone():
    pointer = Pointer.read(PROJECT / "data")
    if os.environ.get("CI") or not data_sets(PROJECT / "data"):  # elsewhere one's own data sets may be recorded too
        assert list(pointer.sets) == ["glyphs"]
