"""The data commands, as a user types them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from kshot_flows.cli import data
from kshot_runtime.errors import KshotError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with photos/ of three classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KSHOT_HOME", raising=False)
    monkeypatch.delenv("KSHOT_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    random = np.random.default_rng(0)
    for name in ("ant", "bee", "cat [tabby]"):
        Path("photos", name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(f"photos/{name}/{i}.png")
    return tmp_path


def kshot_data(*arguments: str) -> str:
    result = CliRunner().invoke(data.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_photos_are_imported_listed_shown_and_verified(place):
    Path("photos/ant/notes.jpg").write_text("to do")
    told = kshot_data("import", "photos", "pets", "--size", "16", "--channels", "1", "--fit", "crop")
    assert "6 images of 3 classes (1 train, 1 val, 1 test)" in " ".join(told.split())
    assert "ant/notes.jpg: not an image" in told
    assert str(place / "data" / "pets" / "sheet.png") in told
    assert "16 x 16 grey" in kshot_data("list")
    shown = kshot_data("show", "pets")
    assert "cat [tabby]" in shown
    assert "crop" in shown
    assert "pets: 6 images are as they were imported" in kshot_data("verify")


def test_a_leak_between_splits_is_refused_and_told_where_it_is_allowed(place):
    for split, name in (("train", "ant"), ("train", "bee"), ("test", "cat [tabby]")):
        Path("in", split).mkdir(parents=True, exist_ok=True)
        Path("photos", name).rename(Path("in", split, name))
    shutil.copy("in/train/ant/0.png", "in/test/cat [tabby]/9.png")
    with pytest.raises(KshotError, match="more than one split"):
        kshot_data("import", "in", "pets")
    told = kshot_data("import", "in", "pets", "--allow-leaks")
    assert "Images in more than one split" in told
    assert "test/cat [tabby]/9.png, train/ant/0.png" in told


def test_groups_are_imported_and_shown(place):
    told = kshot_data("import", "photos", "pets", "--group-by", "{visit}.png")
    assert "groups a class: 2 to 2" in told
    assert "2: 0, 1" in kshot_data("show", "pets")


def test_verify_tells_a_changed_file_and_fails(place):
    kshot_data("import", "photos", "pets")
    images = place / "data" / "pets" / "images.npy"
    images.write_bytes(images.read_bytes()[:-1] + b"\0")
    result = CliRunner().invoke(data.app, ["verify"])
    assert result.exit_code == 1
    assert "changed after the import" in result.output


def test_an_empty_project_says_how_to_begin(place):
    assert "kshot data import glyphs glyphs" in kshot_data("list")


def test_a_mistake_is_a_message(place):
    with pytest.raises(KshotError, match="no data set 'pats'"):
        kshot_data("show", "pats")
    with pytest.raises(KshotError, match="--replace"):
        kshot_data("import", "photos", "pets") and kshot_data("import", "photos", "pets")


def test_sources_are_listed_with_their_splits():
    listed = kshot_data("sources")
    for word in ("glyphs", "omniglot", "vinyals", "mini-imagenet", "mnist"):
        assert word in listed


def test_sets_are_recorded_at_import_pushed_pulled_and_removed(place, monkeypatch):
    for variable in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG"):
        monkeypatch.setenv(f"DVC_{variable}_DIR", str(place / variable))
    kshot_data("import", "photos", "before")
    subprocess.run(["git", "init", "-q"], check=True)
    for command in (["init"], ["remote", "add", "-d", "store", "store"]):
        subprocess.run([sys.executable, "-m", "dvc", *command, "-q"], check=True)
    told = kshot_data("import", "photos", "pets")
    assert "recorded in data.dvc: pets" in told
    assert "git add data.dvc .dvcignore .gitattributes .gitignore && git commit; kshot data push" in told
    listed = {row["name"]: row for row in json.loads(kshot_data("list", "--json"))}
    assert {name: row["state"] for name, row in listed.items()} == {"before": "not recorded", "pets": "recorded"}
    assert (listed["pets"]["images"], listed["pets"]["classes"]) == (6, {"train": 1, "val": 1, "test": 1})
    assert listed["pets"]["dvc"].endswith(".dir")
    assert "not recorded: before. Record it: kshot data commit before" in kshot_data("list")
    told = kshot_data("push")
    assert "The remote has what data.dvc names of pets: 3 files were new there." in told
    assert "Not before as it is here: that is not recorded. To push it too: kshot data commit before" in told
    assert "recorded in data.dvc: before" in kshot_data("commit")
    assert "Nothing to record: data.dvc names pets as here." in kshot_data("commit", "pets")
    assert "names of before, pets: 2 files" in kshot_data("push")  # the images are the same
    shutil.rmtree("data/pets")
    assert "missing: pets. Bring it here: kshot data pull pets" in kshot_data("list")
    assert "not as in data.dvc: pets: missing" in kshot_data("verify")
    assert "verified. Brought here: pets." in kshot_data("pull")
    assert "Brought here: nothing, as they were so." in kshot_data("pull", "pets")
    assert "data.dvc names pets no more" in kshot_data("remove", "pets")
    assert Path("data/pets/index.json").exists()
