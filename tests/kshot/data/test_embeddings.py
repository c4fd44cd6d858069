"""The embedding store: an image passes a backbone once, whoever asks, also after a kill and beside other processes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kshot.backbones import PretrainedBackbone
from kshot.data.datasets import ClassImages, PackedImages
from kshot.data.embeddings import ClassFeatures, backbone_key, embedded
from kshot.data.episodes import Shape
from kshot.evaluation.calibration import calibrate
from kshot.evaluation.open_set import open_set
from kshot.evaluation.scores import evaluate
from kshot.evaluation.verification import verification
from kshot.training import Training, meta_train
from kshot_plugins.maml import MAML
from kshot_plugins.protonet import ProtoNet
from kshot_plugins.siamese import Siamese
from kshot_runtime.errors import KshotError

IMAGE, CLASSES, IMAGES = (1, 4, 4), 60, 10
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks processes")


class Pieces(PretrainedBackbone):
    """Two stages: the first two pixels, and the next three. Writes down how many images pass, and how they do."""

    class Config(PretrainedBackbone.Config):
        zoom: float = 1.0

    widths = ((2,), (3,))

    def __init__(self, config: Config = Config(), log: Path | None = None, seconds: float = 0) -> None:  # noqa: B008
        super().__init__(IMAGE, config)
        self.scale = nn.Parameter(torch.tensor(config.zoom))
        self.seen: list[int] = []
        self.log, self.seconds = log, seconds

    def pooled(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        self.seen.append(len(images))
        if self.log:
            with self.log.open("a") as file:
                file.write(f"{len(images)}\n")
        time.sleep(self.seconds)
        pixels = self.scale * images.flatten(1)
        return [(pixels[:, :2], pixels[:, 2:5])[stage] for stage in stages]


def pixels() -> np.ndarray:
    """(600, 1, 4, 4)"""
    return np.random.default_rng(0).integers(0, 256, (CLASSES * IMAGES, *IMAGE), np.uint8)


def classes(key: str | None = "0" * 64) -> ClassImages:
    """Sixty classes of ten images, packed on disk under this key."""
    names = tuple(map(str, range(CLASSES)))
    starts, counts = np.arange(CLASSES) * IMAGES, np.full(CLASSES, IMAGES)
    return ClassImages([PackedImages(pixels(), key)], starts, counts, names)


def every(images: ClassImages) -> np.ndarray:
    """All of its images, or their features."""
    numbers = np.repeat(np.arange(len(images)), images.counts)
    return images.gather(numbers, np.concatenate([np.arange(count) for count in images.counts]))


def last(images: np.ndarray) -> np.ndarray:
    """The last stage of images (N, 1, 4, 4): (N, 3)."""
    return images.reshape(len(images), -1)[:, 2:5].astype(np.float32) / 255


def passed(log: Path) -> list[int]:
    return list(map(int, log.read_text().split())) if log.exists() else []


def embed_all(store: Path, log: Path, seconds: float = 0) -> None:
    """What another process does; it exits with 0 if every feature is right."""
    found = every(ClassFeatures(classes(), Pieces(log=log, seconds=seconds), store))
    assert np.allclose(found, last(pixels()))


def forked(function: Callable[..., None], *args: object) -> BaseProcess:
    """A process that does this and ends at once: what other tests' libraries do at Python's exit is not for it."""

    def run() -> None:
        try:
            function(*args)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


# Each image once


def test_whatever_is_measured_embeds_each_image_once(tmp_path: Path) -> None:
    backbone, shape = Pieces(), Shape(5, 2, 3)
    frame = ClassFeatures(classes(), backbone, tmp_path)
    seen, unseen = frame.only(range(30)), frame.only(range(30, 60))
    learner = ProtoNet(backbone, ProtoNet.Config())
    fit = calibrate([(learner, seen)], shape, 10, seed=0)
    verification([(learner, seen)], 40, seed=0)
    evaluate(learner, unseen, shape, 30, seed=0)
    open_set([(learner, unseen)], shape, fit, 10, seed=0)
    evaluate(Siamese(backbone, Siamese.Config()), unseen, shape, 30, seed=1)
    frame.complete()
    assert sum(backbone.seen) == CLASSES * IMAGES
    again = Pieces()  # another process would begin so
    learner = ProtoNet(again, ProtoNet.Config())
    evaluate(learner, embedded(learner, classes(), store=tmp_path), shape, 30, seed=2)
    assert again.seen == []


def test_training_on_a_frozen_backbone_embeds_each_image_once_and_one_that_trains_or_augments_does_not(tmp_path: Path):
    settings = Training(steps=12, queries=2, episodes_per_step=4, validate_every=6, validation_queries=2)
    augmented = Training(**{**settings.model_dump(), "augment": {"flip": True}})
    for number, (chosen, frozen) in enumerate([(settings, True), (settings, False), (augmented, True)]):
        backbone = Pieces().requires_grad_(not frozen)
        learner = Siamese(backbone, Siamese.Config())
        train, validation = classes("a" * 64).only(range(30)), classes("b" * 64).only(range(30, 60))
        before = learner.score.weight.clone()
        for _ in meta_train(learner, train, validation, chosen, folder=tmp_path / str(number), seed=0, store=tmp_path):
            pass
        assert not torch.equal(learner.score.weight, before)
        assert (sum(backbone.seen) <= 600) is (number == 0)


def test_without_a_store_features_are_kept_as_long_as_the_classes() -> None:
    backbone = Pieces()
    frame = ClassFeatures(classes(key=None), backbone)
    for _ in range(2):
        np.testing.assert_allclose(every(frame), last(pixels()))
    assert sum(backbone.seen) == CLASSES * IMAGES


def test_classes_of_images_in_memory_never_reach_the_disk(tmp_path: Path) -> None:
    every(ClassFeatures(classes(key=None), Pieces(), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_watcher_is_told_how_many_images_are_done(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    frame = ClassFeatures(classes(), Pieces(), tmp_path, watch=lambda done, total: told.append((done, total)))
    frame.complete()
    assert told[-1] == (600, 600)
    assert told == sorted(told)
    frame.complete()
    assert told[-1] == (600, 600)
    assert told.count((600, 600)) == 1


def test_a_learner_that_changes_the_backbone_is_given_images(tmp_path: Path) -> None:
    learner = MAML(Pieces(), MAML.Config())
    images = classes()
    assert embedded(learner, images, store=tmp_path) is images


def test_features_of_another_backbone_are_refused() -> None:
    frame = ClassFeatures(classes(), Pieces())
    with pytest.raises(ValueError, match="another backbone"):
        embedded(ProtoNet(Pieces(), ProtoNet.Config()), frame)


# What features are


def test_features_are_what_the_backbone_makes_of_the_images_and_views_keep_that(tmp_path: Path) -> None:
    backbone = Pieces()
    frame = ClassFeatures(classes(), backbone, tmp_path)
    assert frame.shape == (3,)

    def as_embedded(features: ClassImages, images: ClassImages) -> None:
        assert isinstance(features, ClassFeatures)
        assert np.array_equal(features.counts, images.counts)
        with torch.no_grad():
            expected = backbone(torch.from_numpy(every(images)) / 255)
        np.testing.assert_allclose(every(features), expected.numpy())

    as_embedded(frame, classes())
    as_embedded(frame.limited(3), classes().limited(3))
    as_embedded(frame.only([5, 2, 40]), classes().only([5, 2, 40]))
    as_embedded(frame.only(range(9)).limited(2), classes().only(range(9)).limited(2))
    as_embedded(frame.with_protocol("across groups"), classes())
    assert frame.with_protocol("across groups").protocol == "across groups"


def test_by_class_gives_the_features_of_each_and_may_be_iterated_again() -> None:
    parts = ClassFeatures(classes(), Pieces()).only([3, 7]).by_class
    assert len(parts) == 2
    for _ in range(2):
        for part, number in zip(parts, (3, 7), strict=True):
            np.testing.assert_allclose(part.numpy(), last(pixels()[number * IMAGES : (number + 1) * IMAGES]))


def test_rotated_classes_have_features_of_their_own(tmp_path: Path) -> None:
    backbone = Pieces()
    frame = ClassFeatures(classes().rotated(), backbone, tmp_path)
    turned = [np.rot90(pixels(), quarters, (2, 3)) for quarters in range(4)]
    np.testing.assert_allclose(every(frame), np.concatenate([last(images) for images in turned]))
    assert sum(backbone.seen) == 4 * CLASSES * IMAGES
    upright = Pieces()
    every(ClassFeatures(classes(), upright, tmp_path))
    assert upright.seen == []  # they are the first of the four


def test_joined_data_sets_share_what_each_has_in_the_store(tmp_path: Path) -> None:
    every(ClassFeatures(classes("a" * 64), Pieces(), tmp_path))
    backbone = Pieces()
    frame = ClassFeatures(ClassImages.joined([classes("a" * 64), classes("b" * 64)]), backbone, tmp_path)
    np.testing.assert_allclose(every(frame), np.concatenate([last(pixels())] * 2))
    assert sum(backbone.seen) == CLASSES * IMAGES  # those of the second


@pytest.mark.parametrize("kind", ["last", "stages", "inner"])
def test_the_outputs_of_all_stages_come_from_one_pass(kind: str, tmp_path: Path) -> None:
    every(ClassFeatures(classes(), Pieces(), tmp_path))
    backbone = Pieces(Pieces.Config(features=kind, frozen=True))
    frame = ClassFeatures(classes(), backbone, tmp_path)
    found = every(frame)
    assert backbone.seen == []
    assert frame.shape == (backbone.features,) == ({"last": 3, "stages": 5, "inner": 2}[kind],)
    with torch.no_grad():
        np.testing.assert_allclose(found, backbone(torch.from_numpy(pixels()) / 255), rtol=1e-5)


def test_another_weight_or_setting_or_size_is_another_key_and_the_choice_of_stages_is_not() -> None:
    class Other(Pieces):
        pass

    moved, larger = Pieces(), Pieces()
    with torch.no_grad():
        moved.scale += 1e-6
    larger.image = (1, 8, 8)
    same = [Pieces(), Pieces(Pieces.Config(features="stages", frozen=True, start="elsewhere.pt"))]
    others = [moved, larger, Pieces(Pieces.Config(zoom=2)), Other()]
    assert len({backbone_key(backbone) for backbone in same}) == 1
    assert len({backbone_key(backbone) for backbone in [same[0], *others]}) == 5


# Kills, company, damage, a full disk


@needs_fork
def test_what_was_written_before_a_kill_is_not_computed_again(tmp_path: Path) -> None:
    store, logs = tmp_path / "store", [tmp_path / "first", tmp_path / "second"]
    process = forked(embed_all, store, logs[0], 0.2)
    while len(passed(logs[0])) < 5:  # the first four passes, of 64 images each, are written together
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    [flags] = store.glob("*/done-0.u8")
    written = int(np.fromfile(flags, np.uint8).sum())
    assert written in (256, 512)
    embed_all(store, logs[1])
    assert sum(passed(logs[1])) == CLASSES * IMAGES - written


@needs_fork
def test_two_processes_at_once_compute_each_image_once_in_all(tmp_path: Path) -> None:
    processes = [forked(embed_all, tmp_path / "store", tmp_path / "log", 0.02) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sum(passed(tmp_path / "log")) == CLASSES * IMAGES


def cut(file: Path) -> None:
    with file.open("r+b") as content:
        content.truncate(file.stat().st_size - 1)


@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda file: file.write_bytes(b"")], ids=["cut", "gone", "empty"])
@pytest.mark.parametrize("which", ["features-0.f32", "done-0.u8"])
def test_a_damaged_file_is_made_anew(which: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    embed_all(tmp_path / "store", tmp_path / "first")
    [file] = (tmp_path / "store").glob(f"*/{which}")
    damage(file)
    embed_all(tmp_path / "store", tmp_path / "second")
    assert sum(passed(tmp_path / "second")) == CLASSES * IMAGES


def on_a_small_disk(store: Path, limit: int, said: Path) -> None:
    """Files may have `limit` bytes here, after which writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        every(ClassFeatures(classes(), Pieces(), store))
    except KshotError as error:
        said.write_text(str(error))


@needs_fork
@pytest.mark.parametrize(("limit", "kept"), [(4000, 0), (256 * 5 * 4 + 100, 256)])
def test_a_full_disk_is_one_sentence_and_keeps_what_was_computed_before(limit: int, kept: int, tmp_path: Path) -> None:
    store, said = tmp_path / "store", tmp_path / "said"
    ClassFeatures(classes(), Pieces(), store).gather(np.array([CLASSES - 1]), np.array([0]))  # the files are there
    process = forked(on_a_small_disk, store, limit, said)
    process.join()
    assert process.exitcode == 0
    words = said.read_text()
    assert words.startswith(f"features cannot be stored in {next(store.iterdir())}: File too large.")
    assert "free some space" in words
    embed_all(store, tmp_path / "log")
    assert sum(passed(tmp_path / "log")) == CLASSES * IMAGES - kept - 1


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KshotError, match=r"features cannot be stored in .*file.*free some space"):
        every(ClassFeatures(classes(), Pieces(), tmp_path / "file"))
