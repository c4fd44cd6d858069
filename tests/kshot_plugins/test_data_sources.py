"""The named data sources: their splits, their checks, and glyphs, which is built from nothing."""

import functools
import gzip
import http.server
import json
import os
import struct
import threading
import zipfile
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kshot.data.datasets import ImageSet
from kshot.data.importing import finish, import_dataset
from kshot_plugins import glyphs, omniglot
from kshot_runtime.errors import KshotError

MIRROR = os.environ.get("KSHOT_MIRROR", "")


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.delenv("KSHOT_MIRROR", raising=False)
    return tmp_path / "data"


def character(seed: int) -> bytes:
    """A 35 x 35 drawing, black on white, one bit."""
    pixels = np.random.default_rng(seed).random((35, 35)) > 0.1
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Every character of the Vinyals split, two drawings of each, as Omniglot's two archives hold them."""
    facts = json.loads(files("kshot_plugins").joinpath("omniglot_vinyals.json").read_text())
    names = sorted({(a, n) for split in ("train", "val", "test") for a, ns in facts[split].items() for n in ns})
    alphabets = sorted({alphabet for alphabet, _ in names})
    folder = tmp_path / "archives"
    folder.mkdir()
    drawing = [character(0), character(1)]
    for part, chosen in (("background", alphabets[:30]), ("evaluation", alphabets[30:])):
        with zipfile.ZipFile(folder / f"images_{part}.zip", "w") as archive:
            for alphabet, number in names:
                if alphabet in chosen:
                    for i, png in enumerate(drawing, start=1):
                        archive.writestr(f"images_{part}/{alphabet}/character{number:02d}/0001_{i:02d}.png", png)
    checksums = {name: ("no md5", omniglot.pixel_checksum(folder / name)) for name in omniglot.ARCHIVES}
    monkeypatch.setattr(omniglot, "ARCHIVES", checksums)
    return folder


def take(source: str, data: Path, **options):
    return finish(import_dataset(source, "it", data, allow_leaks=True, **options))  # these classes share their images


@pytest.mark.parametrize(
    ("split", "counts"),
    [
        (None, {"train": 1028, "val": 172, "test": 423}),
        ("random", {"train": 1100, "val": 100, "test": 423}),
    ],
)
def test_omniglot_has_the_papers_counts_in_each_split(archives, data, split, counts):
    assert take("omniglot", data, from_dir=archives, split=split).splits == counts
    it = ImageSet.open(data / "it")
    assert it.rule.shape == (1, 28, 28)
    assert it.images[0].mean() < 64  # ink is bright, and there is little of it
    assert len(it.split("test", rotations=True)) == 4 * 423


def test_omniglots_vinyals_split_keeps_alphabets_nearly_apart(archives, data):
    take("omniglot", data, from_dir=archives)
    alphabets = {
        split: {name.split("/")[0] for name in ImageSet.open(data / "it").split(split).names}
        for split in ("train", "val", "test")
    }
    assert {split: len(names) for split, names in alphabets.items()} == {"train": 33, "val": 5, "test": 13}
    assert alphabets["train"] & alphabets["test"] == {"Gurmukhi"}


def test_omniglots_background_split_carves_validation_out_by_alphabet(archives, data):
    take("omniglot", data, from_dir=archives, split="background")
    it = ImageSet.open(data / "it")
    train, val, test = ({n.split("/")[0] for n in it.split(s).names} for s in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (25, 5, 20)
    assert not train & val | val & test | train & test


def test_an_archive_that_is_not_omniglots_is_refused(archives, data):
    with zipfile.ZipFile(archives / "images_evaluation.zip", "a") as archive:
        archive.writestr("images_evaluation/Extra/character01/1.png", character(5))
    with pytest.raises(KshotError, match=r"images_evaluation.zip is not Omniglot's.*fetch it again: https"):
        take("omniglot", data, from_dir=archives)


def test_a_folder_without_the_archives_says_what_should_be_there(tmp_path, data):
    with pytest.raises(KshotError, match=r"has no images_background.zip"):
        take("omniglot", data, from_dir=tmp_path)
    with pytest.raises(KshotError, match="is not a folder"):
        take("omniglot", data, from_dir=tmp_path / "nowhere")


def test_an_unknown_split_is_answered_with_those_that_exist(archives, data):
    with pytest.raises(KshotError, match="it has: vinyals, random, background"):
        take("omniglot", data, from_dir=archives, split="vinyal")


def test_archives_are_found_in_a_mirror(archives, data, monkeypatch):
    archives.rename(archives.with_name("omniglot"))
    monkeypatch.setenv("KSHOT_MIRROR", str(archives.parent))
    assert take("omniglot", data).images == 2 * 1623


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_archives_are_downloaded_once(archives, data, monkeypatch):
    handler = functools.partial(Quiet, directory=archives)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(omniglot, "URL", f"http://127.0.0.1:{server.server_port}/")
        try:
            first = take("omniglot", data)
        finally:
            server.shutdown()
            thread.join()
    assert take("omniglot", data, replace=True).version == first.version  # from what was kept: nobody serves it now


def test_without_a_network_the_way_out_is_told(data, monkeypatch):
    monkeypatch.setattr(omniglot, "URL", "http://127.0.0.1:9/")
    with pytest.raises(KshotError, match=r"could not fetch .* --from DIR, or set KSHOT_MIRROR"):
        take("omniglot", data)


@pytest.fixture
def wnids():
    return json.loads(files("kshot_plugins").joinpath("mini_imagenet_ravi.json").read_text())


def jpg(seed: int) -> bytes:
    file = BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("layout", ["zips", "split folders", "class folders"])
def test_mini_imagenet_comes_from_zips_or_folders_in_ravis_split(tmp_path, data, wnids, layout):
    folder = tmp_path / "mini"
    for split, names in wnids.items():
        for wnid in names:
            home = folder / wnid if layout == "class folders" else folder / split / wnid
            home.mkdir(parents=True)
            for i in range(2):
                (home / f"{i}.jpg").write_bytes(jpg(i))
    if layout == "zips":
        for split in wnids:
            with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
                for file in (folder / split).rglob("*.jpg"):
                    archive.write(file, file.relative_to(folder))
    take("mini-imagenet", data, from_dir=folder, rule={"size": 20})
    it = ImageSet.open(data / "it")
    assert it.splits == {"train": 64, "val": 16, "test": 20}
    assert set(it.split("test").names) == set(wnids["test"])


def test_mini_imagenet_with_strange_missing_or_misplaced_classes_is_refused(tmp_path, data, wnids):
    def lay(*paths: str) -> None:
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(jpg(0))

    train, test = wnids["train"][0], wnids["test"][0]
    lay(f"one/{train}/1.jpg", "one/n00000000/1.jpg")
    lay(f"two/test/{train}/1.jpg")
    lay(f"three/{train}/1.jpg", f"three/{test}/1.jpg")
    for folder, message in (
        ("one", "none of the 100 classes"),
        ("two", "belongs to train, not test"),
        ("three", "lacks 98 of the 100"),
    ):
        with pytest.raises(KshotError, match=message):
            take("mini-imagenet", data, from_dir=tmp_path / folder)
    with pytest.raises(KshotError, match="cannot be downloaded"):
        take("mini-imagenet", data)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">3sB{array.ndim}I", b"\0\0\x08", array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, file, count, packed=False, first=0):
    """So many images, all different, of the digits 0 to 9 in turn."""
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 0, 0] = np.arange(first, first + count)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for name, array in ((f"{file}-images-idx3-ubyte", images), (f"{file}-labels-idx1-ubyte", labels)):
        content = idx(array)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return images


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_ten_classes_to_test_on(tmp_path, data, packed):
    images = write_mnist(tmp_path, "t10k", 20, packed)
    assert take("mnist", data, from_dir=tmp_path, split="test").splits == {"test": 10}
    it = ImageSet.open(data / "it")
    assert it.split("test").names == tuple(f"test/{digit}" for digit in range(10))
    assert np.array_equal(it.images[0, 0], images[0])
    assert np.array_equal(it.images[3, 0], images[11])  # the second 1


def test_the_images_of_both_mnist_files_are_apart_and_their_classes_the_same_digits(tmp_path, data):
    write_mnist(tmp_path, "t10k", 20)
    with pytest.raises(KshotError, match=r"has neither train-images.* For the test file alone: --split test"):
        take("mnist", data, from_dir=tmp_path)
    images = write_mnist(tmp_path, "train", 40, first=20)
    assert take("mnist", data, from_dir=tmp_path).splits == {"train": 10, "test": 10}
    it = ImageSet.open(data / "it")
    assert (it.split("train").names[9], it.split("test").names[9]) == ("train/9", "test/9")
    assert np.array_equal(it.split("train").gather(np.array([1]), np.array([3]))[0, 0], images[31])  # the fourth 1
    assert it.hashes("train").keys().isdisjoint(it.hashes("test"))


@pytest.mark.parametrize("damage", [b"", b"\0\0\x09\x03" + bytes(12), idx(np.zeros((5, 28, 28), np.uint8))[:99]])
def test_damaged_mnist_files_are_refused(tmp_path, data, damage):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(damage)
    with pytest.raises(KshotError, match="damaged, or no idx file"):
        take("mnist", data, from_dir=tmp_path)
    with pytest.raises(KshotError, match="has neither"):
        take("mnist", data, from_dir=Path(__file__).parent)


def test_a_damaged_archive_is_refused(tmp_path, data, archives):
    content = bytearray(gzip.compress(idx(np.arange(5 * 28 * 28).astype(np.uint8).reshape(5, 28, 28))))
    content[20:60] = bytes(40)  # no deflate stream any more
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(KshotError, match="damaged, or no idx file"):
        take("mnist", data, from_dir=tmp_path)
    path = archives / "images_evaluation.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b/c.png", bytes(range(256)) * 40)
    content = bytearray(path.read_bytes())
    content[50:90] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(KshotError, match=r"is not Omniglot's images_evaluation\.zip"):
        take("omniglot", data, from_dir=archives)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    data = tmp_path_factory.mktemp("built")
    report = finish(import_dataset("glyphs", "glyphs", data))
    return report, ImageSet.open(data / "glyphs")


def test_glyphs_are_many_classes_of_twenty_split_by_alphabet(built):
    report, it = built
    assert report.splits["train"] > 600
    assert min(report.splits.values()) >= 60
    assert {c.count for c in it.classes} == {glyphs.IMAGES}
    alphabets = {split: {name.split("/")[0] for name in it.split(split).names} for split in it.splits}
    assert alphabets["val"] == {"Armenian", "Hebrew"}
    assert alphabets["test"] == {"Arabic", "Georgian", "Greek", "Lao"}


def test_glyphs_are_all_different_and_none_is_empty(built):
    report, it = built
    ink = np.asarray(it.images) > 127
    assert (ink.sum((1, 2, 3)) >= 10).all()
    assert report.duplicates == ()


def test_a_drawing_that_alphabets_share_is_one_class_only(built):
    _, it = built
    names = {c.name for c in it.classes}
    assert "Latin/capital a" in names
    assert "Greek/capital alpha" not in names
    assert "Cyrillic/small a" not in names
    assert {"Greek/capital omega", "Cyrillic/capital zhe"} <= names
    skipped = {s.name: s.why for s in it.index.skipped}
    assert skipped["Greek/capital alpha"] == "the same drawing as latin capital letter a"


def test_letters_that_a_face_lacks_are_not_drawn_with_it():
    assert "STIXGeneral.ttf" not in glyphs._faces_with("\u05d0")  # Hebrew: a box, if it were drawn
    assert len(glyphs._faces_with("A")) == len(glyphs.FACES)


def test_glyphs_do_not_depend_on_what_was_drawn_before():
    alone = glyphs.draw("Ω", 7)
    glyphs.draw("Ω", 6)
    assert glyphs.draw("Ω", 7).tobytes() == alone.tobytes()
    assert glyphs.draw("Ω", 8).tobytes() != alone.tobytes()


def test_the_committed_pointer_names_the_glyphs_that_are_built_here(built):
    report, _ = built
    pointer = Path(__file__).parents[2] / "data.dvc"
    assert report.version in pointer.read_text()


@pytest.mark.skipif(not MIRROR, reason="KSHOT_MIRROR names no mirror of the real archives")
def test_the_real_omniglot_passes_its_checksums():
    for name, (_, pixels) in omniglot.ARCHIVES.items():
        assert omniglot.pixel_checksum(Path(MIRROR, "omniglot", name)) == pixels
