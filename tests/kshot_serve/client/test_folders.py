"""A label space from a folder or a zip of class folders: at the server's start, or by a client."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kshot_client import Client, ClientError, Filling
from kshot_serve.settings import Settings

Photo = Callable[..., bytes]
KSHOT = Path(sys.executable).with_name("kshot")
LIMITS = {"ways": 5, "shots": 3, "support": 100, "photos": 2}


@pytest.fixture
def colours(tmp_path: Path, photo: Photo) -> Path:
    """Two classes of three photos each, one unreadable file, and what is nobody's photo."""
    folder = tmp_path / "colours"
    for name in ("red", "blue"):
        (folder / name).mkdir(parents=True)
        for shade in range(3):
            (folder / name / f"{shade}.png").write_bytes(photo(name, shade))
    (folder / "red" / "notes.txt").write_text("not a photo")
    (folder / "red" / ".DS_Store").write_bytes(b"hidden")
    (folder / "LICENSE").write_text("of no class")
    return folder


def held(space: Any) -> dict[str, int]:
    return {each["name"]: len(each["photos"]) for each in space.classes()}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_client_fills_a_label_space_and_a_second_time_adds_nothing(
    server: Any, colours: Path, tmp_path: Path, kind: str
) -> None:
    source = colours
    if kind == "zip":  # with a folder around the classes, as file managers make them
        (colours / "LICENSE").unlink()
        source = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "colours"))
    with Client(server.url) as client:
        space, told = client.space(f"filled from a {kind}"), list[Filling]()
        filling = space.fill(source, told.append)
        assert (filling.added, filling.there, len(told)) == (6, 0, 2)
        [unread] = filling.skipped
        assert "red/notes.txt: not an image in a format that is taken" in unread
        again = space.fill(source)
        assert (again.added, again.there, len(again.skipped)) == (0, 6, 1)
        assert held(space) == {"blue": 3, "red": 3}
        assert space.classify((colours / "red" / "1.png").read_bytes()).name == "red"


def test_a_server_starts_with_label_spaces_and_a_second_start_adds_nothing_twice(
    running: Any, features_bundle: Path, colours: Path, tmp_path: Path, photo: Photo, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path / "serve", port=0, leave_s=0, fill=(colours,))
    for added, there in ((6, 0), (1, 6)):
        with running(settings) as started, Client(started.url) as client:
            assert (
                f"colours: classes 2, photos added {added}, there already {there}, notes 1\n" in capfd.readouterr().err
            )
            [space] = client.spaces()
            assert space.name == "colours"
            assert sum(held(space).values()) == added + there
        (colours / "blue" / "late.png").write_bytes(photo("blue", 9))


def test_the_command_fills_once_however_many_workers_there_are(
    features_bundle: Path, colours: Path, tmp_path: Path
) -> None:
    zipped = shutil.make_archive(str(tmp_path / "zipped"), "zip", colours)
    process = subprocess.Popen(
        [KSHOT, "serve", features_bundle, "--space", colours, "--space", zipped, "--workers", "2", "--port", "0",
         "--folder", "serve"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    with Client(line.split()[-1]) as client:
        both = {"blue": 3, "red": 3}
        assert {space.name: held(space) for space in client.spaces()} == {"colours": both, "zipped": both}
    process.terminate()
    told = process.communicate(timeout=60)[1]
    assert told.count("colours: ") == 1
    assert "\n  red/notes.txt: not an image" in told


def test_of_too_many_photos_the_first_of_each_class_count_and_it_is_said(colours: Path) -> None:
    def taken(known: dict[str, list[str]], **limits: int) -> tuple[Filling, dict[str, list[str]]]:
        filling, found = Filling(colours), dict[str, list[str]]()
        for name, batch in filling.batches(known, **(LIMITS | limits)):
            assert len(batch) <= 2
            found.setdefault(name, []).extend(batch)
        return filling, found

    filling, found = taken({}, support=4)
    assert found == {"blue": ["blue/0.png", "blue/1.png"], "red": ["red/0.png", "red/1.png"]}
    assert filling.skipped[0] == (
        "of blue, red the first 2 photos count; this model learns from at most 3 of a class and 4 in all"
    )
    filling, found = taken({"blue": ["another's"] * 1 + ["others'"]})
    assert found["blue"] == ["blue/0.png"]
    assert filling.skipped[1] == "blue/1.png: the class has 3 photos, and the model takes no more"
    with pytest.raises(ClientError, match="colours would have 3 classes, and this model tells at most 2 apart"):
        taken({"green": []}, ways=2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "has no folders with photos in them: give each class a folder named after it"),
        (lambda path: path.write_bytes(b"no zip"), "is neither a folder nor a zip of class folders"),
        (lambda path: None, "is neither a folder nor a zip of class folders"),
    ],
)
def test_what_holds_no_class_folders_is_refused_before_a_model_is_loaded(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(tmp_path / "source")
    process = subprocess.run(
        [KSHOT, "serve", "no-bundle", "--space", "source", "--port", "0"], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 1
    assert f"source {reason}" in process.stderr
