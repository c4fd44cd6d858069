"""Branches that add, change and remove data sets, merged by git."""

import subprocess
import sys

import pytest

from kshot_flows.data import versioning
from kshot_flows.data.pointer import Entry, Pointer
from kshot_runtime.errors import KshotError


@pytest.fixture
def merged(project, git, commit):
    """What a merge of two branches gives: each has the sets of `base`, changed and added to by its own."""

    def entry(content: str) -> Entry:
        return Entry(f"{content * 32}.dir", content * 64, nfiles=2, size=1234)

    def write(sets: dict[str, str]) -> None:
        Pointer(project / "data.dvc").changed({name: entry(content) for name, content in sets.items()}).write()
        commit(project)

    def merged(base: dict[str, str], ours: dict[str, str], theirs: dict[str, str]) -> Pointer:
        write(base)
        git(project, "checkout", "-qb", "theirs")
        write(theirs)
        git(project, "checkout", "-qb", "ours", "main")
        write(ours)
        git(project, "merge", "-q", "theirs", "-m", "both")
        return Pointer.read(project / "data")

    return merged


A, B, BASE = {"glyphs": "1"}, {"glyphs": "1", "pets": "2"}, {"glyphs": "1", "pets": "2", "zoo": "3"}


@pytest.mark.parametrize(
    ("base", "ours", "theirs", "both"),
    [
        (A, A | {"pets": "2"}, A | {"zoo": "3"}, A | {"pets": "2", "zoo": "3"}),
        (A, A | {"ants": "2"}, A | {"bees": "3"}, A | {"ants": "2", "bees": "3"}),
        (A, {"glyphs": "4"}, A | {"pets": "2"}, {"glyphs": "4", "pets": "2"}),
        (A, {"glyphs": "4"}, A | {"ants": "2"}, {"glyphs": "4", "ants": "2"}),
        (B, B | {"glyphs": "4"}, B | {"pets": "5"}, {"glyphs": "4", "pets": "5"}),
        (BASE, BASE | {"pets": "5"}, {"glyphs": "1", "pets": "2"}, {"glyphs": "1", "pets": "5"}),
        (B, B | {"pets": "5"}, B | {"pets": "5"}, B | {"pets": "5"}),
    ],
    ids=["two new", "two new before", "one changed, one new", "one changed, one new before", "two changed",
         "one changed, one removed", "the same change twice"],
)  # fmt: skip
def test_branches_merge_by_themselves(merged, base, ours, theirs, both):
    pointer = merged(base, ours, theirs)
    assert {name: entry.version[0] for name, entry in pointer.sets.items()} == both
    assert {name: entry.md5[0] for name, entry in pointer.sets.items()} == both
    pointer.refuse_twice()


def test_two_branches_that_import_different_sets_merge_and_both_are_pulled(project, tmp_path, git, commit, take):
    root = project / "data"
    with (project / ".dvc" / "config").open("a") as config:
        config.write(f"    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'store'}\n")
    take(root, "glyphs")
    versioning.record(root)
    commit(project)
    for seed, name in enumerate(("pets", "zoo"), start=1):
        git(project, "checkout", "-qb", name, "main")
        take(root, name, seed=seed)
        versioning.record(root, name)
        versioning.push(root)
        commit(project)
    git(project, "merge", "-q", "pets", "-m", "both")
    git(tmp_path, "clone", "-q", "project", "clone")
    there = tmp_path / "clone" / "data"
    assert versioning.pull(there) == ["glyphs", "pets", "zoo"]
    assert git(tmp_path / "clone", "status", "--short") == ""


def test_two_versions_of_one_set_are_an_error_until_one_is_recorded(project, git, commit, take):
    root = project / "data"
    take(root)
    take(root, "pets", seed=1)
    versioning.record(root)
    commit(project)
    for seed, name in enumerate(("ours", "theirs"), start=2):
        git(project, "checkout", "-qb", name, "main")
        take(root, "zoo", seed=seed, replace=True)
        versioning.record(root, "zoo")
        commit(project)
    git(project, "merge", "-q", "ours", "-m", "both")
    for act in (versioning.push, versioning.pull):
        with pytest.raises(
            KshotError, match=r"data.dvc has two versions of zoo: two branches .* kshot data commit zoo"
        ):
            act(root)
    with pytest.raises(KshotError, match="two versions of zoo"):
        versioning.record(root, "pets")
    assert subprocess.run(
        [sys.executable, "-m", "dvc", "status"], cwd=project, capture_output=True
    ).returncode  # nor does DVC take it
    assert versioning.record(root, "zoo").new == ("zoo",)
    assert versioning.state_of(root) == {"pets": "recorded", "zoo": "recorded"}
