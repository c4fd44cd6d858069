"""Packed data sets: images memory-mapped as uint8, and an index of classes, splits and files.

`data/NAME/images.npy` holds the images, class after class; `data/NAME/index.json` is the index.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from kshot_runtime.errors import KshotError
from kshot_runtime.images import ImageRule

IMAGES, INDEX, SHEET = "images.npy", "index.json", "sheet.png"
SPLITS = ("train", "val", "test")
MIRRORED = 4  # instead of a number of quarter turns: mirrored left to right
Protocol = Literal["random photos", "across groups"]
"""How the queries of a class are drawn: from all of its photos, or from other groups than the support set."""


def splits_of(reference: str, own: str) -> dict[str, str]:
    """The data sets of a split reference, in order, and the splits of each; a KshotError if a split does not exist.

    A reference is `SPLIT` of the data set `own`, or `DATASET:SPLIT` of another, or several of these joined by `+`:
    `train+glyphs:train+val` names `{own: "train+val", "glyphs": "train"}`.
    """
    found: dict[str, str] = {}
    for part in reference.split("+"):
        name, colon, split = part.strip().rpartition(":")
        if split not in SPLITS or (colon and not name):
            close = difflib.get_close_matches(split, SPLITS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise KshotError(
                f"{part!r} is not a split; {hint}"
                f"write SPLIT or DATASET:SPLIT, joined by '+'; a split is one of {', '.join(SPLITS)}"
            )
        name = name or own
        found[name] = f"{found[name]}+{split}" if name in found else split
    return found


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassEntry(_Part):
    """One class: its images are `images[start : start + count]`."""

    name: str
    split: Literal["train", "val", "test"]
    start: int
    count: int


class FileEntry(_Part):
    """One image's file, in the order of the images."""

    name: str
    sha256: str
    group: str | None = None  # photos that belong together: a visit, a camera, a patient


class Skipped(_Part):
    """A file that was not imported, and the reason."""

    name: str
    why: str


class Index(_Part):
    """The metadata of a data set. Equal inputs give equal bytes: it contains no dates and no paths."""

    schema_version: Literal[1] = 1
    name: str
    source: str  # the importer's name, or the name of the folder or zip
    provenance: str
    licence: str
    rule: ImageRule
    images_sha256: str
    classes: tuple[ClassEntry, ...]
    files: tuple[FileEntry, ...]
    skipped: tuple[Skipped, ...]
    duplicates: tuple[tuple[str, ...], ...]  # groups of identical files

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1, exclude_none=True).encode() + b"\n"


@lru_cache(maxsize=4)
def _parsed(content: bytes) -> tuple[Index, str]:
    """The index in a file's bytes, and their sha256; cached, since a run opens its data sets many times."""
    return Index.model_validate_json(content), hashlib.sha256(content).hexdigest()


class ImageSet:
    """A data set on disk. `open` reads the index and maps the images; `split` returns classes to draw episodes from."""

    def __init__(self, folder: Path, index: Index, images: np.ndarray, version: str) -> None:
        self.folder = folder
        self.index = index
        self.images = images  # (N, C, H, W) uint8, memory-mapped
        self.version = version  # sha256 of the index, which holds the sha256 of the images

    @classmethod
    def open(cls, folder: str | Path) -> ImageSet:
        folder = Path(folder)
        try:
            content = (folder / INDEX).read_bytes()
        except OSError:
            raise KshotError(_no_such_data_set(folder)) from None
        try:
            index, version = _parsed(content)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"])) or "the file"
            raise KshotError(f"{folder / INDEX} is damaged: {where}: {problem['msg']}. {_again(folder)}") from None
        try:
            images = np.load(folder / IMAGES, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            raise KshotError(f"{folder / IMAGES} is missing or damaged. {_again(folder)}") from None
        expected = (len(index.files), *index.rule.shape)
        if images.shape != expected or images.dtype != np.uint8:
            raise KshotError(
                f"{folder / IMAGES} holds {images.dtype} {images.shape}, and its index says uint8 {expected}: "
                f"they are not of the same import. {_again(folder)}"
            )
        return cls(folder, index, images, version)

    @property
    def name(self) -> str:
        return self.index.name

    @property
    def rule(self) -> ImageRule:
        return self.index.rule

    @property
    def classes(self) -> tuple[ClassEntry, ...]:
        return self.index.classes

    @property
    def splits(self) -> dict[str, int]:
        """The splits that exist, with the number of classes in each."""
        counts = {split: sum(c.split == split for c in self.classes) for split in SPLITS}
        return {split: count for split, count in counts.items() if count}

    def split(self, name: str, rotations: bool = False) -> ClassImages:
        """The classes of one split, or of several: `train+val`. `rotations` adds rotated classes."""
        parts = name.split("+")
        for part in parts:
            if part not in self.splits:
                close = difflib.get_close_matches(part, self.splits, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "."
                has = ", ".join(f"{split} ({count} classes)" for split, count in self.splits.items())
                raise KshotError(f"data set {self.name!r} has no split named {part!r}{hint} It has: {has}")
        chosen = [c for c in self.classes if c.split in parts]
        starts = np.array([c.start for c in chosen], dtype=np.int64)
        counts = np.array([c.count for c in chosen], dtype=np.int64)
        packed = PackedImages(np.asarray(self.images), self.index.images_sha256, self.groups)
        classes = ClassImages([packed], starts, counts, tuple(c.name for c in chosen))
        return classes.rotated() if rotations else classes

    @property
    def groups(self) -> np.ndarray | None:
        """The number of each image's group (N,), if all images have one; equal names have equal numbers."""
        names = [f.group for f in self.index.files if f.group is not None]
        return np.unique(names, return_inverse=True)[1] if len(names) == len(self.index.files) else None

    def hashes(self, splits: str) -> dict[str, str]:
        """Maps the sha256 of each file in a split, or in several (`train+val`), to its name."""
        chosen = (c for c in self.classes if c.split in splits.split("+"))
        return {f.sha256: f.name for c in chosen for f in self.index.files[c.start : c.start + c.count]}

    def verify(self) -> None:
        """Compare the sha256 of the images with the index; a KshotError if they differ."""
        found = file_sha256(self.folder / IMAGES)
        if found != self.index.images_sha256:
            raise KshotError(
                f"{self.folder / IMAGES} has sha256 {found[:12]}…, and its index says "
                f"{self.index.images_sha256[:12]}…: it was changed after the import. {_again(self.folder)}"
            )


class PackedImages(NamedTuple):
    """The images of one data set."""

    images: np.ndarray  # (N, C, H, W) uint8
    key: str | None = None  # the sha256 of images.npy; None for images in memory
    groups: np.ndarray | None = None  # (N,) int: the group of each image, where known


class Groups(NamedTuple):
    """The groups of some classes. With a class's images sorted by group, a group is a contiguous range of them."""

    order: np.ndarray  # (images,) class after class, the sample numbers of each sorted by group
    klass: np.ndarray  # (groups,) int: in ascending order
    start: np.ndarray  # (groups,) where the range begins among its class's images in `order`
    size: np.ndarray  # (groups,) images in it


class ClassImages:
    """Classes as arrays, from which episodes are drawn. A rotated class is a separate class."""

    def __init__(
        self,
        packed: Sequence[PackedImages],  # of each joined data set; images all of one C, H, W
        starts: np.ndarray,  # (classes,) int64: where each class begins in the images of its data set
        counts: np.ndarray,  # (classes,) int64: images per class
        names: tuple[str, ...],
        turns: np.ndarray | None = None,  # (classes,) quarter turns, counter-clockwise
        classes_per_data_set: tuple[int, ...] = (),  # number of classes from each joined data set, in order
    ) -> None:
        self._packed = tuple(packed)
        self._starts = starts
        self._turns = np.zeros_like(starts) if turns is None else turns
        self.counts = counts
        self.names = names
        self.classes_per_data_set = classes_per_data_set or (len(counts),)
        self.protocol: Protocol = "random photos"
        self._home = np.repeat(np.arange(len(packed)), self.classes_per_data_set)  # (classes,) index into packed

    @classmethod
    def from_arrays(
        cls,
        images_per_class: Sequence[np.ndarray],
        names: Sequence[str] | None = None,
        groups_per_class: Sequence[Sequence[int]] | None = None,
    ) -> ClassImages:
        """Classes from uint8 arrays (images, C, H, W), one per class, and optionally the group of each image."""
        counts = np.array([len(images) for images in images_per_class], dtype=np.int64)
        names = [str(i) for i in range(len(counts))] if names is None else names
        if len(names) != len(counts):
            raise ValueError(f"{len(names)} names for {len(counts)} classes")
        images = np.concatenate(images_per_class)  # (N, C, H, W)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"expected uint8 (images, C, H, W) per class, got {images.dtype} {images.shape}")
        groups = None if groups_per_class is None else np.concatenate(groups_per_class)  # (N,)
        return cls([PackedImages(images, groups=groups)], np.cumsum(counts) - counts, counts, tuple(names))

    @classmethod
    def joined(cls, parts: Sequence[ClassImages]) -> ClassImages:
        """The classes of several, concatenated without copying images; a KshotError if image shapes differ."""
        if len(parts) == 1:
            return parts[0]
        if len(shapes := dict.fromkeys(part.shape for part in parts)) > 1:
            raise KshotError(f"only images of one shape can be joined; these are {' and '.join(map(str, shapes))}")
        return cls(
            [packed for part in parts for packed in part._packed],
            np.concatenate([part._starts for part in parts]),
            np.concatenate([part.counts for part in parts]),
            tuple(name for part in parts for name in part.names),
            np.concatenate([part._turns for part in parts]),
            tuple(count for part in parts for count in part.classes_per_data_set),
        ).with_protocol(parts[0].protocol)

    def rotated(self) -> ClassImages:
        """These classes, followed by those rotated by 90, 180 and 270 degrees, as separate classes."""
        if self.shape[1] != self.shape[2]:
            raise KshotError(f"only square images can be rotated as classes, and these are {self.shape}")
        if self._turns.any():
            raise KshotError("these classes are rotated already")
        if len(self._packed) > 1:
            raise KshotError("rotate the classes of each data set before joining them")
        names = self.names + tuple(f"{name} rot{turn:03d}" for turn in (90, 180, 270) for name in self.names)
        turns = np.repeat(np.arange(4), len(self))
        turned = ClassImages(self._packed, np.tile(self._starts, 4), np.tile(self.counts, 4), names, turns)
        return turned.with_protocol(self.protocol)

    def with_protocol(self, protocol: Protocol) -> ClassImages:
        """The same classes with this protocol."""
        view = copy.copy(self)
        view.protocol = protocol
        return view

    def limited(self, most: int) -> Self:
        """The same classes with at most the first `most` images of each."""
        fewer = self._view()
        fewer.counts = np.minimum(self.counts, most)
        return fewer

    def only(self, classes: Sequence[int] | np.ndarray) -> Self:
        """Some of these classes, by their numbers."""
        chosen = np.sort(np.asarray(classes, np.int64))
        some = self._view()
        some._starts, some.counts, some._turns = self._starts[chosen], self.counts[chosen], self._turns[chosen]
        some.names, some._home = tuple(self.names[i] for i in chosen), self._home[chosen]
        some.classes_per_data_set = tuple(np.bincount(some._home, minlength=len(self._packed)).tolist())
        return some

    def _view(self) -> Self:
        """A copy that shares the images but no cached properties."""
        view = copy.copy(self)
        for name in ("groups", "by_class"):  # cached properties, of subclasses too
            vars(view).pop(name, None)
        return view

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image: (C, H, W)."""
        _, channels, height, width = self._packed[0].images.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def keys(self) -> tuple[str | None, ...]:
        """The sha256 of each joined data set's packed images; None for images in memory."""
        return tuple(packed.key for packed in self._packed)

    @property
    def packed_counts(self) -> tuple[int, ...]:
        """The number of packed images of each joined data set, including those of other classes."""
        return tuple(len(packed.images) for packed in self._packed)

    @cached_property
    def groups(self) -> Groups | None:
        """The groups of these classes; None unless every image has one."""
        known = [packed.groups for packed in self._packed if packed.groups is not None]
        if len(known) < len(self._packed):
            return None
        classes, before = np.repeat(np.arange(len(self)), self.counts), np.cumsum(self.counts) - self.counts
        samples = np.arange(len(classes)) - before[classes]
        home, row, _ = self.rows(classes, samples)
        offsets = np.cumsum(self.packed_counts) - self.packed_counts
        group = np.concatenate(known)[offsets[home] + row]  # (images,)
        order = np.lexsort((group, classes))  # sorts within classes
        first = np.flatnonzero(np.diff(classes, prepend=-1) | np.diff(group[order], prepend=-1))  # (groups,)
        klass = classes[first]
        return Groups(samples[order], klass, first - before[klass], np.diff(first, append=len(classes)))

    def rows(self, classes: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where images are packed, from class numbers and image numbers within them: (home, row, turn), each (*batch,).

        An image is `row` of the packed images of data set number `home`, rotated by `turn` quarter turns.
        """
        classes, samples = np.broadcast_arrays(classes, samples)
        outside = (samples < 0) | (samples >= self.counts[classes])
        if outside.any():
            klass, sample = classes[outside][0], samples[outside][0]
            raise IndexError(f"image {sample} of class {klass}, which has {self.counts[klass]}")
        return self._home[classes], self._starts[classes] + samples, self._turns[classes]

    def gather(self, classes: np.ndarray, samples: np.ndarray, *, support: bool = False) -> np.ndarray:
        """Images by class numbers and image numbers within them, broadcast together: uint8 (*batch, C, H, W)."""
        return self.read(*self.rows(classes, samples))

    def read(self, home: np.ndarray, row: np.ndarray, turn: np.ndarray) -> np.ndarray:
        """The images at these locations, as returned by `rows`, or `MIRRORED`: uint8 (*batch, C, H, W)."""
        images = np.empty((*row.shape, *self.shape), np.uint8)  # (*batch, C, H, W)
        for number, packed in enumerate(self._packed):
            here = home == number
            images[here] = packed.images[row[here]]
        for quarters in (1, 2, 3):
            turned = turn == quarters
            if turned.any():
                images[turned] = np.rot90(images[turned], quarters, axes=(-2, -1))
        mirrored = turn == MIRRORED
        images[mirrored] = images[mirrored][..., ::-1]
        return images


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_sets(root: Path) -> list[str]:
    """The names of the data sets under a data folder."""
    return sorted(index.parent.name for index in root.glob(f"[!.]*/{INDEX}"))


def _again(folder: Path) -> str:
    return f"Import it again (--replace), or restore the recorded version: kshot data pull {folder.name}"


def _no_such_data_set(folder: Path) -> str:
    others = data_sets(folder.parent)
    close = difflib.get_close_matches(folder.name, others, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f" (there: {', '.join(others) or 'none'})."
    return f"no data set {folder.name!r} in {folder.parent}{hint} Import one: kshot data import SOURCE {folder.name}"
