"""Import: any folder or zip of images becomes a data set, whatever lies in it, or nothing is left behind."""

import multiprocessing
import os
import resource
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kshot.data.datasets import INDEX, ImageSet
from kshot.data.importing import ImportReport, Progress, finish, import_dataset
from kshot.data.sources import random_split
from kshot_runtime.errors import KshotError

SMALL = {"size": 12}


def png(seed: int, side: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def photos(root: Path, classes: int = 5, images: int = 3, start: int = 0) -> Path:
    """A folder for each class, every image different."""
    for c in range(classes):
        folder = root / f"class{c + start}"
        folder.mkdir(parents=True)
        for i in range(images):
            (folder / f"{i}.png").write_bytes(png(100 * (c + start) + i))
    return root


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(folder))
    return target


def take(source: Path, data: Path, name: str = "mine", **options) -> ImportReport:
    return finish(import_dataset(str(source), name, data, **{"rule": SMALL, **options}))


def nothing_left(data: Path) -> bool:
    return {p.name for p in data.glob("*")} <= {".locks"}


def message_of(function: Callable[[], None]) -> str:
    """The KshotError that this raises in a process of its own, where it may give up rights."""

    def run() -> None:
        try:
            function()
        except KshotError as error:
            messages.put(str(error))
        else:
            messages.put("no error")

    context = multiprocessing.get_context("fork")
    messages = context.SimpleQueue()
    process = context.Process(target=run)
    process.start()
    message = messages.get()
    process.join()
    return message


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def test_folders_become_classes_with_their_images_in_order(tmp_path, data):
    report = take(photos(tmp_path / "in"), data)
    mine = ImageSet.open(data / "mine")
    mine.verify()
    assert (report.images, report.splits, report.version) == (15, {"train": 3, "val": 1, "test": 1}, mine.version)
    assert [c.name for c in mine.classes] == [f"class{i}" for i in range(5)]
    assert [f.name for f in mine.index.files[:4]] == ["class0/0.png", "class0/1.png", "class0/2.png", "class1/0.png"]
    first = np.asarray(Image.open(BytesIO(png(100)))).transpose(2, 0, 1)
    assert np.array_equal(mine.images[mine.classes[1].start], first)
    with Image.open(report.sheet) as sheet:
        assert sheet.width > 500


def test_progress_is_reported_and_the_report_comes_last(tmp_path, data):
    source = photos(tmp_path / "in", classes=3, images=70)
    *steps, report = import_dataset(str(source), "mine", data, rule=SMALL)
    assert isinstance(report, ImportReport)
    assert all(isinstance(step, Progress) for step in steps)
    assert [(step.done, step.total) for step in steps] == [(100, 210), (200, 210), (210, 210)]


def test_the_same_input_gives_the_same_bytes(tmp_path, data):
    source = photos(tmp_path / "in")
    zipped_source = zipped(source, tmp_path / "in.zip")
    take(source, data, "one")
    once = [(data / "one" / file).read_bytes() for file in ("images.npy", INDEX, "sheet.png")]
    take(source, data, "one", replace=True)
    assert once == [(data / "one" / file).read_bytes() for file in ("images.npy", INDEX, "sheet.png")]
    take(zipped_source, data, "one", replace=True)
    assert once[0] == (data / "one" / "images.npy").read_bytes()


def test_a_zip_with_one_folder_around_everything(tmp_path, data):
    photos(tmp_path / "in" / "wrapper")
    take(zipped(tmp_path / "in", tmp_path / "photos.ZIP"), data)
    assert ImageSet.open(data / "mine").classes[0].name == "class0"


def test_a_folder_of_one_split_is_no_wrapper_however_it_is_written(tmp_path, data):
    photos(tmp_path / "in" / "Train", 3)
    assert take(tmp_path / "in", data).splits == {"train": 3}


def test_a_data_set_of_any_name_can_be_replaced(tmp_path, data):
    take(photos(tmp_path / "in"), data, "old")
    take(photos(tmp_path / "again", classes=7), data, "old", replace=True)
    assert len(ImageSet.open(data / "old").classes) == 7


def test_folders_split_already_stay_split(tmp_path, data):
    photos(tmp_path / "in" / "train", 3)
    photos(tmp_path / "in" / "valid", 1, start=3)
    photos(tmp_path / "in" / "test", 2, start=4)
    take(tmp_path / "in", data)
    mine = ImageSet.open(data / "mine")
    assert mine.splits == {"train": 3, "val": 1, "test": 2}
    assert mine.split("val").names == ("class3",)
    with pytest.raises(KshotError, match="split already"):
        take(tmp_path / "in", data, "other", split="0/0/1")


def test_a_class_in_two_splits_is_refused(tmp_path, data):
    photos(tmp_path / "in" / "train", 3)
    photos(tmp_path / "in" / "test", 3)
    with pytest.raises(KshotError, match=r"class 'class0' is in test and in train. Splits are by class"):
        take(tmp_path / "in", data)
    assert nothing_left(data)


def test_splits_are_seeded_shares_with_one_class_each_at_least():
    names = [f"{i:02d}" for i in range(10)]
    first = random_split(names, (0.6, 0.2, 0.2), 0)
    assert first == random_split(names, (0.6, 0.2, 0.2), 0)
    assert first != random_split(names, (0.6, 0.2, 0.2), 1)
    assert sorted(first) == names
    assert sorted(first.values()) == ["test"] * 2 + ["train"] * 6 + ["val"] * 2
    assert sorted(random_split(names[:3], (0.98, 0.01, 0.01), 0).values()) == ["test", "train", "val"]
    assert set(random_split(names, (0, 0, 1), 0).values()) == {"test"}


def test_shares_can_be_chosen(tmp_path, data):
    assert take(photos(tmp_path / "in"), data, split="0.4/0.2/0.4").splits == {"train": 2, "val": 1, "test": 2}
    with pytest.raises(KshotError, match=r"such as 0.6/0.2/0.2"):
        take(tmp_path / "in", data, "other", split="half")


def test_bad_files_are_listed_with_reasons_and_the_rest_is_taken(tmp_path, data):
    source = photos(tmp_path / "in")
    (source / "class0" / "text.png").write_text("I am not an image")
    (source / "class0" / "speck.png").write_bytes(png(1, side=1))
    noise = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(noise, "JPEG")
    (source / "class1" / "cut.jpg").write_bytes(noise.getvalue()[:-300])
    (source / "class1" / "empty.jpg").write_bytes(b"")
    (source / "class1" / ".DS_Store").write_bytes(b"x")
    (source / "readme.txt").write_text("hello")
    (source / "class2" / "gone.png").symlink_to("nowhere.png")
    (source / "linked").symlink_to(source / "class0")
    report = take(source, data)
    why = {s.name: s.why for s in report.skipped}
    assert report.images == 15
    assert "not an image" in why["class0/text.png"]
    assert "1 x 1 pixels; at least 8" in why["class0/speck.png"]
    assert "cut short" in why["class1/cut.jpg"]
    assert "not an image" in why["class1/empty.jpg"]
    assert "operating system" in why["class1/.DS_Store"]
    assert "not in the folder of a class" in why["readme.txt"]
    assert "not a regular file" in why["class2/gone.png"]
    assert "links are not followed" in why["linked/"]
    assert ImageSet.open(data / "mine").index.skipped == report.skipped


def test_if_no_file_can_be_used_the_reasons_are_told(tmp_path, data):
    (tmp_path / "in" / "cats").mkdir(parents=True)
    (tmp_path / "in" / "cats" / "1.png").write_text("meow")
    with pytest.raises(KshotError, match=r"not one of 1 files can be used:\n  cats/1.png: not an image"):
        take(tmp_path / "in", data)
    with pytest.raises(KshotError, match="there are no files"):
        take(_empty(tmp_path), data)
    assert nothing_left(data)


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_a_class_with_too_few_images_is_left_out_and_listed(tmp_path, data):
    source = photos(tmp_path / "in", classes=4)
    (source / "class0" / "1.png").unlink()
    (source / "class0" / "2.png").unlink()
    report = take(source, data)
    assert [(s.name, s.why) for s in report.skipped] == [
        ("class0/0.png", "its class 'class0' has too few usable images: 1 of at least 2")
    ]
    assert [c.name for c in ImageSet.open(data / "mine").classes] == ["class1", "class2", "class3"]
    ImageSet.open(data / "mine").verify()


def test_one_class_only_is_refused_with_a_way_out(tmp_path, data):
    source = photos(tmp_path / "in", classes=1)
    with pytest.raises(KshotError, match=r"only one class \('class0'\).*--split 0/0/1"):
        take(source, data)
    assert nothing_left(data)
    assert take(source, data, split="0/0/1").splits == {"test": 1}


def test_equal_files_are_reported_and_those_across_splits_are_refused_unless_allowed(tmp_path, data):
    photos(tmp_path / "in" / "train", 2)
    photos(tmp_path / "in" / "val", 1, start=2)
    photos(tmp_path / "in" / "test", 1, start=3)
    (tmp_path / "in/train/class0/again.png").write_bytes(png(0))
    (tmp_path / "in/test/class3/leak.png").write_bytes(png(100))
    with pytest.raises(KshotError, match="1 images are in more than one split") as refused:
        take(tmp_path / "in", data)
    assert "test/class3/leak.png (test) = train/class1/0.png (train)" in str(refused.value)
    assert "--allow-leaks" in str(refused.value)
    assert nothing_left(data)
    report = take(tmp_path / "in", data, allow_leaks=True)
    assert report.duplicates == (
        ("test/class3/leak.png", "train/class1/0.png"),
        ("train/class0/0.png", "train/class0/again.png"),
    )
    assert report.leaks == [("test/class3/leak.png", "train/class1/0.png")]


def visits(root: Path) -> Path:
    """Three classes, the last a nested name, each with visits 1 and 2 of two images."""
    for number, name in enumerate(("ant", "bee", "cat/tabby")):
        for visit in (1, 2):
            (folder := root / name / f"visit{visit}").mkdir(parents=True)
            for image in (0, 1):
                (folder / f"{image}.png").write_bytes(png(100 * number + 10 * visit + image))
    return root


def test_the_last_folder_is_the_group_where_the_user_says_so(tmp_path, data):
    report = take(visits(tmp_path / "in"), data, group_by="folder")
    assert report.groups == {"ant": 2, "bee": 2, "cat/tabby": 2}
    mine = ImageSet.open(data / "mine")
    assert [(f.name, f.group) for f in mine.index.files[7:9]] == [
        ("bee/visit2/1.png", "visit2"),
        ("cat/tabby/visit1/0.png", "visit1"),
    ]
    assert mine.split("train+val+test").groups.size.tolist() == [2] * 6
    take(tmp_path / "in", data, "nested")
    assert [c.name for c in ImageSet.open(data / "nested").classes][:2] == ["ant/visit1", "ant/visit2"]


def test_a_part_of_the_file_name_is_the_group(tmp_path, data):
    source = photos(tmp_path / "in")
    for file in source.rglob("?.png"):
        file.rename(file.with_name(f"{'train' if file.stem == '0' else 'test'}_x_{file.name}"))
    report = take(source, data, group_by="{split}_*")
    assert report.groups == {f"class{i}": 2 for i in range(5)}
    assert [f.group for f in ImageSet.open(data / "mine").index.files[:3]] == ["test", "test", "train"]
    take(source, data, "other", group_by="*_x_{number}.png")
    assert [f.group for f in ImageSet.open(data / "other").index.files[:3]] == ["1", "2", "0"]


@pytest.mark.parametrize(
    ("group_by", "message"),
    [
        ("visit", r"--group-by 'visit': write folder, .* or a pattern"),
        ("{visit}_{camera}", "write folder"),
        ("{visit}_*", r"15 of 15 pictures are not matched, such as class0/0.png, class0/1.png"),
        ("folder", r"15 of 15 pictures are not in a group's folder inside a class's folder, such as class0/0.png"),
    ],
)
def test_a_picture_without_a_group_is_named_and_nothing_is_taken(tmp_path, data, group_by, message):
    with pytest.raises(KshotError, match=message):
        take(photos(tmp_path / "in"), data, group_by=group_by)
    assert nothing_left(data)


def test_an_index_without_groups_does_not_mention_them(tmp_path, data):
    take(photos(tmp_path / "in"), data)
    assert "group" not in (data / "mine" / INDEX).read_text()
    assert ImageSet.open(data / "mine").split("train").groups is None


def test_no_such_source_and_no_such_folder(tmp_path, data):
    with pytest.raises(KshotError, match="no folder or zip"):
        take(tmp_path / "nowhere", data)
    with pytest.raises(
        KshotError, match=r"no folder or zip 'omnigloth' here, and no data source .* did you mean 'omniglot'"
    ):
        finish(import_dataset("omnigloth", "mine", data))


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "x" * 65, "[red]"])
def test_names_that_are_no_folder_names_are_refused(tmp_path, data, name):
    with pytest.raises(KshotError, match="cannot name a data set"):
        take(tmp_path, data, name)


def test_an_unknown_rule_says_what_would_fit(tmp_path, data):
    with pytest.raises(KshotError, match="channels = 2: Input should be 1 or 3"):
        take(photos(tmp_path / "in"), data, rule={"channels": 2})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_an_unreadable_folder_is_refused():
    with tempfile.TemporaryDirectory() as place:  # not in tmp_path, which nobody else may enter
        root = Path(place)
        photos(root / "in")
        (root / "data").mkdir()
        for folder, mode in ((root, 0o755), (root / "data", 0o777), (root / "in" / "class1", 0)):
            folder.chmod(mode)

        def try_as_nobody() -> None:
            os.setresuid(65534, 65534, 65534)
            take(root / "in", root / "data")

        assert "class1: Permission denied" in message_of(try_as_nobody)
        assert nothing_left(root / "data")


@pytest.mark.parametrize(
    "member", ["../evil.png", "cats/../../evil.png", "/etc/evil.png", "cats\\evil.png", "C:/evil.png", "."]
)
def test_a_zip_with_paths_out_of_it_is_refused(tmp_path, data, member):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("cats/1.png", png(0))
        archive.writestr(member, png(1))
    with pytest.raises(KshotError, match="path out of the archive"):
        take(tmp_path / "in.zip", data)
    assert nothing_left(data)


def test_a_zip_with_symbolic_links_is_refused(tmp_path, data):
    link = zipfile.ZipInfo("cats/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("cats/1.png", png(0))
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(KshotError, match="symbolic link"):
        take(tmp_path / "in.zip", data)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, data):
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"cats/{i}.png", bytes(30_000_000))
    with pytest.raises(KshotError, match="no archive of images does"):
        take(tmp_path / "in.zip", data)


def test_a_file_too_large_in_a_zip_is_skipped_and_not_read_whole(tmp_path, data):
    source = photos(tmp_path / "in")
    (source / "class0" / "huge.png").write_bytes(os.urandom(20_000_001))
    report = take(zipped(source, tmp_path / "in.zip"), data)
    assert "at most 20,000,000 are taken" in report.skipped[0].why


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + b"\0" * 50])
def test_what_is_no_zip_is_refused(tmp_path, data, content):
    (tmp_path / "in.zip").write_bytes(content)
    with pytest.raises(KshotError, match="not a zip, or it is damaged"):
        take(tmp_path / "in.zip", data)


def test_a_damaged_member_of_a_zip_is_skipped(tmp_path, data):
    source = zipped(photos(tmp_path / "in"), tmp_path / "in.zip")
    content = bytearray(source.read_bytes())
    content[60] ^= 255  # in the stored bytes of the first image: its checksum no longer holds
    source.write_bytes(content)
    assert [(s.name, s.why) for s in take(source, data).skipped] == [("class0/0.png", "damaged in the zip")]


def test_a_name_that_is_taken_is_kept_unless_told(tmp_path, data):
    before = take(photos(tmp_path / "in"), data)
    photos(tmp_path / "in", classes=1, start=5)
    with pytest.raises(KshotError, match=r"exists already.*--replace"):
        take(tmp_path / "in", data)
    assert ImageSet.open(data / "mine").version == before.version
    assert take(tmp_path / "in", data, replace=True).images == before.images + 3


def test_a_failed_replacement_keeps_what_was_there(tmp_path, data):
    before = take(photos(tmp_path / "in"), data)
    with pytest.raises(KshotError):
        take(_empty(tmp_path), data, replace=True)
    assert ImageSet.open(data / "mine").version == before.version


def test_a_full_disk_leaves_nothing_behind(tmp_path, data):
    source = photos(tmp_path / "in", classes=10)

    def fill_up() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        take(source, data)

    assert "Nothing of it was kept" in message_of(fill_up)
    assert nothing_left(data)


def test_an_import_that_is_given_up_leaves_nothing_behind(tmp_path, data):
    events = import_dataset(str(photos(tmp_path / "in", classes=3, images=40)), "mine", data, rule=SMALL)
    next(events)
    assert any(p.name.startswith(".importing-mine") for p in data.iterdir())
    events.close()
    assert nothing_left(data)


SLOW_IMPORT = """
import sys, time
from pathlib import Path
from kshot.data.importing import ImportReport, import_dataset
for event in import_dataset(sys.argv[1], "mine", Path(sys.argv[2]), rule={"size": 12}, replace=True):
    if not isinstance(event, ImportReport):
        print(event.what, flush=True)
        time.sleep(float(sys.argv[3]))
"""


def test_a_killed_import_is_cleared_away_by_the_next(tmp_path, data):
    source = photos(tmp_path / "in", classes=3, images=40)
    command = [sys.executable, "-c", SLOW_IMPORT, str(source), str(data), "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
    assert not (data / "mine").exists()
    take(source, data)
    assert {p.name for p in data.iterdir()} == {".locks", "mine"}


def test_two_imports_of_one_name_at_once_do_not_mix(tmp_path, data):
    one, two = photos(tmp_path / "one", 3, 40), photos(tmp_path / "two", 3, 41, start=3)
    command = [sys.executable, "-c", SLOW_IMPORT, str(one), str(data), "0.5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        first.stdout.readline()
        *events, report = import_dataset(str(two), "mine", data, rule=SMALL, replace=True)
        assert events[0].what == "waiting for another import of mine" or first.poll() is not None
        first.communicate()
    assert first.returncode == 0
    mine = ImageSet.open(data / "mine")
    mine.verify()
    assert (mine.version, len(mine.images)) == (report.version, 123)
    assert {p.name for p in data.iterdir()} == {".locks", "mine"}
