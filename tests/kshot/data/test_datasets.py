"""Packed data sets: what is gathered is what was stored, and damage is told."""

import json

import numpy as np
import pytest

from kshot.data.datasets import (
    IMAGES,
    INDEX,
    ClassEntry,
    ClassImages,
    FileEntry,
    ImageSet,
    Index,
    file_sha256,
    splits_of,
)
from kshot_runtime.errors import KshotError
from kshot_runtime.images import ImageRule

COUNTS = {"ant": 3, "bee": 2, "cat": 4, "dog": 2}
SPLITS = {"ant": "train", "bee": "test", "cat": "train", "dog": "val"}


@pytest.fixture
def folder(tmp_path):
    """Four classes of 2 x 2 images; image i of all is four numbers from 4 i on."""
    folder = tmp_path / "data" / "zoo"
    folder.mkdir(parents=True)
    total = sum(COUNTS.values())
    np.save(folder / IMAGES, np.arange(4 * total, dtype=np.uint8).reshape(total, 1, 2, 2))
    starts = dict(zip(COUNTS, np.cumsum([0, *COUNTS.values()]).tolist(), strict=False))
    index = Index(
        name="zoo",
        source="here",
        provenance="",
        licence="",
        rule=ImageRule(size=2, channels=1),
        images_sha256=file_sha256(folder / IMAGES),
        classes=tuple(ClassEntry(name=n, split=SPLITS[n], start=starts[n], count=COUNTS[n]) for n in COUNTS),
        files=tuple(FileEntry(name=f"{i}.png", sha256="") for i in range(total)),
        skipped=(),
        duplicates=(),
    )
    (folder / INDEX).write_bytes(index.to_bytes())
    return folder


def test_a_split_holds_its_classes_only(folder):
    zoo = ImageSet.open(folder)
    train = zoo.split("train")
    assert (zoo.name, zoo.rule.shape, zoo.splits) == ("zoo", (1, 2, 2), {"train": 2, "val": 1, "test": 1})
    assert (train.names, train.counts.tolist(), train.shape, len(train)) == (("ant", "cat"), [3, 4], (1, 2, 2), 2)
    assert isinstance(zoo.images, np.memmap)


def test_gather_gives_the_image_of_that_number_in_that_class(folder):
    train = ImageSet.open(folder).split("train")
    images = train.gather(np.array([[0], [1]]), np.array([[2, 0], [3, 1]]))  # (2, 2, C, H, W)
    assert images.shape == (2, 2, 1, 2, 2)
    assert images[..., 0, 0, 0].tolist() == [[4 * 2, 4 * 0], [4 * 8, 4 * 6]]


def test_gather_refuses_an_image_that_the_class_does_not_have(folder):
    train = ImageSet.open(folder).split("train")
    with pytest.raises(IndexError, match="image 3 of class 0, which has 3"):
        train.gather(np.array([1, 0]), np.array([3, 3]))
    with pytest.raises(IndexError):
        train.gather(np.array([0]), np.array([-1]))


def test_gathered_images_may_be_written_to(folder):
    zoo = ImageSet.open(folder)
    zoo.split("val").gather(np.array([0]), np.array([0]))[...] = 0
    zoo.verify()


def test_rotated_classes_come_after_the_split_and_are_classes_of_their_own(folder):
    zoo = ImageSet.open(folder)
    train = zoo.split("train", rotations=True)
    assert len(train) == 8
    assert train.names[2:4] == ("ant rot090", "cat rot090")
    assert set(train.names).isdisjoint(zoo.split("test", rotations=True).names)
    upright = train.gather(np.array([1]), np.array([0]))[0]
    for turn in range(4):
        turned = train.gather(np.array([1 + 2 * turn]), np.array([0]))[0]
        assert np.array_equal(turned, np.rot90(upright, turn, axes=(1, 2)))
    with pytest.raises(KshotError, match="rotated already"):
        train.rotated()


def test_rotation_of_mixed_classes_at_once_equals_one_by_one(folder):
    train = ImageSet.open(folder).split("train", rotations=True)
    random = np.random.default_rng(0)
    classes = random.integers(0, 8, (5, 4, 1))
    samples = random.integers(0, 3, (5, 4, 2))
    images = train.gather(classes, samples)
    for i in np.ndindex(5, 4, 2):
        assert np.array_equal(images[i], train.gather(classes[i[:2]], samples[i][None])[0])


def test_splits_can_be_joined(folder):
    assert ImageSet.open(folder).split("train+val").names == ("ant", "cat", "dog")


def test_a_reference_names_splits_of_its_own_data_set_and_of_others():
    assert splits_of("train", "zoo") == {"zoo": "train"}
    assert splits_of("farm:train+val+farm:test", "zoo") == {"farm": "train+test", "zoo": "val"}


@pytest.mark.parametrize(
    ("reference", "message"),
    [("zoo:trian", "did you mean 'train'"), ("train+", "one of train, val, test"), (":train", "DATASET:SPLIT")],
)
def test_a_misspelt_reference_is_answered_with_how_one_is_written(reference, message):
    with pytest.raises(KshotError, match=message):
        splits_of(reference, "zoo")


def test_joined_classes_keep_their_images_their_data_sets_and_what_was_turned(folder):
    zoo = ImageSet.open(folder)
    train, val = zoo.split("train", rotations=True), zoo.split("val")
    joined = ClassImages.joined([val, train])
    assert (joined.classes_per_data_set, len(joined), joined.names) == ((1, 8), 9, val.names + train.names)
    assert joined.counts.tolist() == [2, *train.counts.tolist()]
    images = joined.gather(np.array([[0], [3], [8]]), np.array([0, 1]))  # (3, 2, C, H, W)
    assert np.array_equal(images[0], val.gather(np.array([0, 0]), np.array([0, 1])))
    assert np.array_equal(images[1], train.gather(np.array([2, 2]), np.array([0, 1])))
    assert np.array_equal(images[2], train.gather(np.array([7, 7]), np.array([0, 1])))
    assert ClassImages.joined([train]) is train
    with pytest.raises(KshotError, match="before joining"):
        ClassImages.joined([val, zoo.split("test")]).rotated()


def test_rows_say_where_images_are_packed_and_how_they_are_turned(folder):
    zoo = ImageSet.open(folder)
    memory = ClassImages.from_arrays([np.zeros((5, *zoo.rule.shape), np.uint8)])
    joined = ClassImages.joined([memory, zoo.split("train", rotations=True)])
    assert joined.keys == (None, zoo.index.images_sha256)
    assert joined.packed_counts == (5, len(zoo.images))
    home, row, turn = joined.rows(np.array([[0], [8]]), np.array([0, 1]))  # (2, 2) each
    start = next(c.start for c in zoo.classes if c.name == "cat")
    assert (home.tolist(), row.tolist(), turn.tolist()) == (
        [[0, 0], [1, 1]], [[0, 1], [start, start + 1]], [[0, 0], [3, 3]],
    )  # fmt: skip
    upright = joined.read(home[1], row[1], np.zeros(2, int))  # (2, C, H, W)
    assert np.array_equal(upright, zoo.images[start : start + 2])


def test_images_of_two_shapes_cannot_be_joined():
    small, large = (ClassImages.from_arrays([np.zeros((2, 1, side, side), np.uint8)]) for side in (2, 3))
    with pytest.raises(KshotError, match=r"these are \(1, 2, 2\) and \(1, 3, 3\)"):
        ClassImages.joined([small, large])


def test_an_unknown_split_is_answered_with_those_that_exist(folder):
    with pytest.raises(KshotError, match=r"no split named 'tests'; did you mean 'test'\? It has: train \(2 classes\)"):
        ImageSet.open(folder).split("tests")


def test_an_unknown_data_set_is_answered_with_those_that_exist(folder):
    with pytest.raises(KshotError, match=r"no data set 'zooo' in .* did you mean 'zoo'"):
        ImageSet.open(folder.with_name("zooo"))


def test_the_version_changes_with_the_index(folder):
    before = ImageSet.open(folder).version
    assert before == ImageSet.open(folder).version
    (folder / INDEX).write_text((folder / INDEX).read_text().replace('"test"', '"val"'))
    assert before != ImageSet.open(folder).version


def test_one_changed_pixel_is_found(folder):
    content = bytearray((folder / IMAGES).read_bytes())
    content[-1] ^= 1
    (folder / IMAGES).write_bytes(content)
    zoo = ImageSet.open(folder)
    with pytest.raises(KshotError, match="changed after the import"):
        zoo.verify()


@pytest.mark.parametrize("damage", ["cut index", "unknown field", "cut images", "no images", "other images", "pickle"])
def test_damage_is_told_when_a_data_set_is_opened(folder, damage):
    index, images = folder / INDEX, folder / IMAGES
    match damage:
        case "cut index":
            index.write_bytes(index.read_bytes()[:100])
        case "unknown field":
            index.write_text(json.dumps(json.loads(index.read_text()) | {"more": 1}))
        case "cut images":
            images.write_bytes(images.read_bytes()[:-8])
        case "no images":
            images.unlink()
        case "other images":
            np.save(images, np.zeros((3, 1, 2, 2), np.uint8))
        case "pickle":
            np.save(images, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(KshotError, match=r"[Ii]mport"):
        ImageSet.open(folder)


def test_arrays_of_ones_own_can_be_sampled_too():
    classes = ClassImages.from_arrays(
        [np.zeros((2, 3, 4, 5), np.uint8), np.ones((1, 3, 4, 5), np.uint8)], ["no", "yes"]
    )
    assert (classes.names, classes.counts.tolist(), classes.shape) == (("no", "yes"), [2, 1], (3, 4, 5))
    assert classes.gather(np.array([1]), np.array([0])).min() == 1
    with pytest.raises(KshotError, match="square"):
        classes.rotated()
    with pytest.raises(ValueError, match="uint8"):
        ClassImages.from_arrays([np.zeros((2, 3, 4, 5))])
