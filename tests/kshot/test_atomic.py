"""A folder that takes another's place: there is always one of the two."""

import pytest

from kshot import atomic


def made(folder, text):
    folder.mkdir(parents=True)
    (folder / "what").write_text(text)
    return folder


def test_the_new_folder_takes_the_place_of_the_old_or_of_nothing(tmp_path):
    atomic.replace(tmp_path / "it", made(tmp_path / "a" / "new", "first"))
    atomic.replace(tmp_path / "it", made(tmp_path / "b" / "new", "second"))
    assert (tmp_path / "it" / "what").read_text() == "second"


def test_what_cannot_take_its_place_leaves_the_old_one_there(tmp_path):
    old = made(tmp_path / "it", "first")
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError):
        atomic.replace(old, tmp_path / "a" / "never made")
    assert (old / "what").read_text() == "first"
