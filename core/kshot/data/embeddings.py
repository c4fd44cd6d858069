"""The embedding store: features of images, computed once for each backbone and cached in memory or on disk."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from kshot import malloc
from kshot.backbones import Backbone, PretrainedBackbone
from kshot.data.datasets import MIRRORED, ClassImages
from kshot.data.episodes import as_floats
from kshot.learner import Learner
from kshot_runtime.errors import KshotError

_AT_ONCE = 64  # images in a forward pass
_PIXELS = 64 * 84 * 84  # in a forward pass on a CPU, which bounds the memory of larger images
_WRITE_EVERY = 256  # images between writes to disk: the most that are lost if the process is killed
_MAX_BYTES = 20 << 30  # of all features in a store; the least recently used are deleted first
_IRRELEVANT = {"features", "frozen", "mirror", "start"}  # settings that do not change the outputs of the stages

Watch = Callable[[int, int], None]
"""Called with the number of images embedded so far, and the number to embed."""


def embedded(
    learner: Learner, images: ClassImages, *, store: Path | None = None, device: str = "cpu", watch: Watch | None = None
) -> ClassImages:
    """`images` as features of the learner's backbone, if it takes features; else unchanged.

    Features are computed on first use and cached in memory, or on disk in the folder `store`.
    """
    if isinstance(images, ClassFeatures):
        if images.backbone is not learner.backbone:
            raise ValueError("these features come from another backbone than the learner's")
        return images
    return ClassFeatures(images, learner.backbone, store, device, watch) if learner.takes_features else images


class ClassFeatures(ClassImages):
    """Classes as features of their images: `gather` returns float32 (*batch, D) instead of pixels."""

    def __init__(
        self,
        images: ClassImages,
        backbone: Backbone,
        store: Path | None = None,
        device: str = "cpu",
        watch: Watch | None = None,
    ) -> None:
        vars(self).update(vars(images))
        self.images: ClassImages = images.images if isinstance(images, ClassFeatures) else images
        self.backbone = backbone
        self._device, self._watch = device, watch or (lambda done, total: None)
        name = backbone_key(backbone) if store else ""
        width = sum(map(sum, backbone.widths)) if isinstance(backbone, PretrainedBackbone) else backbone.features
        self._tables = {
            (home, turn): _OnDisk(store / f"{key[:24]}-{name[:24]}", turn, count, width)
            if store and key
            else _InMemory(count, width)
            for home, (key, count) in enumerate(zip(self.keys, self.packed_counts, strict=True))
            for turn in (0, 1, 2, 3, MIRRORED)
        }

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]  # features have one dimension
        """The shape of the features of an image: (D,)."""
        return (self.backbone.features,)

    def complete(self) -> Self:
        """Compute all features of these classes that are not cached yet, and return self."""
        classes = np.repeat(np.arange(len(self)), self.counts)
        samples = np.arange(len(classes)) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        home, row, turn = self.rows(classes, samples)
        for turned in (turn, np.full_like(turn, MIRRORED)) if self.backbone.mirrors else (turn,):
            for _ in self._by_table(home, row, turned):
                pass
        return self

    def gather(self, classes: np.ndarray, samples: np.ndarray, *, support: bool = False) -> np.ndarray:
        """Features of images: float32 (*batch, D). With `support`, averaged over mirror images if that is set."""
        home, row, turn = self.rows(classes, samples)
        own = self.read(home, row, turn)
        if not (support and self.backbone.mirrors):
            return own
        if turn.any():
            raise KshotError("rotated classes have no mirror images: set mirror = false in [backbone]")
        return (own + self.read(home, row, np.full_like(turn, MIRRORED))) / 2

    def read(self, home: np.ndarray, row: np.ndarray, turn: np.ndarray) -> np.ndarray:
        """The features of the images at these locations: float32 (*batch, D)."""
        found = np.empty((*row.shape, self.backbone.features), np.float32)
        for here, table in self._by_table(home, row, turn):
            found[here] = self._selected(table.values[row[here]])
        return found

    def _by_table(
        self, home: np.ndarray, row: np.ndarray, turn: np.ndarray
    ) -> Iterator[tuple[np.ndarray, _InMemory | _OnDisk]]:
        """The tables with these rows, which are computed if missing, each with a mask (*batch,) of the rows in it."""
        for (number, quarters), table in self._tables.items():
            here = (home == number) & (turn == quarters)
            if here.any():
                table.ensure(np.unique(row[here]), partial(self._embed, number, quarters))
                yield here, table

    def pixels(self) -> ClassImages:
        """The same classes as images."""
        images = copy.copy(self)
        images.__class__ = ClassImages  # type: ignore[assignment]  # whose `read` returns pixels
        return images

    @cached_property
    def by_class(self) -> Sequence[Tensor]:
        """The features (N, D) of each class, read on access."""
        return _ByClass(self)

    def _selected(self, raw: np.ndarray) -> np.ndarray:
        """Features (N, D) from rows of a table, which hold the outputs of all stages (N, width)."""
        if not isinstance(self.backbone, PretrainedBackbone):
            return raw
        widths, wanted = self.backbone.widths, set(self.backbone.stages)
        parts = torch.from_numpy(raw).split([width for stage in widths for width in stage], 1)
        owner = [stage for stage, part in enumerate(widths) for _ in part]
        chosen = [part for stage, part in zip(owner, parts, strict=True) if stage in wanted]
        return self.backbone.assemble(chosen).numpy()

    @torch.no_grad()
    def _embed(self, home: int, turn: int, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Compute the rows of a table with these numbers (N,), and yield them in batches (n, width)."""
        was_training, (_, height, width) = self.backbone.training, self.images.shape
        at_once = _AT_ONCE if self._device != "cpu" else max(4, min(_AT_ONCE, _PIXELS // (height * width)))
        self.backbone.eval()
        try:
            with malloc.kept():
                for start in range(0, len(rows), at_once):
                    part = rows[start : start + at_once]
                    pixels = self.images.read(np.full(len(part), home), part, np.full(len(part), turn))
                    floats = as_floats(pixels).to(self._device)
                    if isinstance(self.backbone, PretrainedBackbone):
                        every = range(len(self.backbone.widths))
                        outputs = torch.cat(self.backbone.pooled(floats, every), 1)
                    else:
                        outputs = self.backbone(floats)
                    yield outputs.float().cpu().numpy()
                    self._watch(min(start + at_once, len(rows)), len(rows))
        finally:
            self.backbone.train(was_training)


class _ByClass(Sequence[Tensor]):
    def __init__(self, classes: ClassFeatures) -> None:
        self._classes = classes

    def __len__(self) -> int:
        return len(self._classes)

    def __getitem__(self, number: int) -> Tensor:  # type: ignore[override]  # no slices
        if not 0 <= number < len(self):
            raise IndexError(number)
        samples = np.arange(self._classes.counts[number])
        return torch.from_numpy(self._classes.gather(np.full(len(samples), number), samples))


Compute = Callable[[np.ndarray], Iterator[np.ndarray]]
"""Yields the rows of a table with these numbers (N,), in batches (n, width)."""


class _InMemory:
    """A table of features of `count` images in memory."""

    def __init__(self, count: int, width: int) -> None:
        self._done = np.zeros(count, bool)
        self.values = np.empty((count, width), np.float32)  # takes no memory until it is written to

    def ensure(self, numbers: np.ndarray, compute: Compute) -> None:
        """Compute the rows with these numbers (N,), in ascending order, that are not cached yet."""
        new, start = numbers[~self._done[numbers]], 0
        for part in compute(new) if len(new) else ():
            self.values[new[start : start + len(part)]] = part
            start += len(part)
        self._done[new] = True


class _OnDisk:
    """A table of features of `count` images in a file, with a flag byte for each row; processes can share it.

    Written with plain writes, which fail on a full disk where a memory map would crash. Features are written before
    their flags, so an incomplete row is never read.
    """

    def __init__(self, folder: Path, turn: int, count: int, width: int) -> None:
        self._folder, self._count, self._width = folder, count, width
        self._file, self._flags = folder / f"features-{turn}.f32", folder / f"done-{turn}.u8"

    @property
    def values(self) -> np.ndarray:
        """The features (count, width); a row is valid after `ensure`."""
        return self._opened[0]

    def ensure(self, numbers: np.ndarray, compute: Compute) -> None:
        """As `_InMemory.ensure`, under a lock that other processes wait for."""
        done = self._opened[1]
        if not done[numbers].all():
            with FileLock(self._folder / "lock"):
                new = numbers[done[numbers] == 0]  # another process may have computed some
                self._write(new, compute(new))

    @cached_property
    def _opened(self) -> tuple[np.ndarray, np.ndarray]:
        """Features (count, width) and done flags (count,); files that are missing or of a wrong size are recreated."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / "lock"):
                sizes = {self._flags: self._count, self._file: 4 * self._count * self._width}
                if any(not file.exists() or file.stat().st_size != size for file, size in sizes.items()):
                    _make_room(self._folder.parent, self._folder)
                    for file, size in sizes.items():
                        with file.open("wb") as empty:
                            empty.truncate(size)  # sparse: takes no space until it is written to
            os.utime(self._folder)
        except OSError as error:
            raise _no_room(self._folder, error) from None
        return (
            np.memmap(self._file, np.float32, "r", shape=(self._count, self._width)),
            np.memmap(self._flags, np.uint8, "r", shape=self._count),
        )

    def _write(self, numbers: np.ndarray, parts: Iterator[np.ndarray]) -> None:
        start, held = 0, list[np.ndarray]()
        for part in parts:
            held.append(part)
            if (count := sum(map(len, held))) >= _WRITE_EVERY or start + count == len(numbers):
                self._put(numbers[start : start + count], np.concatenate(held))
                start, held = start + count, []

    def _put(self, numbers: np.ndarray, values: np.ndarray) -> None:
        try:
            with self._file.open("r+b") as file:
                for number, row in zip(numbers, np.ascontiguousarray(values, np.float32), strict=True):
                    file.seek(4 * self._width * int(number))
                    file.write(row.data)
                file.flush()
                os.fsync(file.fileno())
            with self._flags.open("r+b") as file:
                for number in numbers:
                    file.seek(int(number))
                    file.write(b"\1")
        except OSError as error:
            raise _no_room(self._folder, error) from None


def backbone_key(backbone: Backbone) -> str:
    """sha256 of all that determines a backbone's outputs: weights, settings, image size and code."""
    digest = hashlib.sha256(type(backbone).__qualname__.encode())
    with suppress(OSError, TypeError):
        digest.update(Path(inspect.getfile(type(backbone))).read_bytes())
    settings = backbone.config.model_dump(mode="json", exclude=_IRRELEVANT)
    digest.update(json.dumps([settings, backbone.norm, backbone.image], sort_keys=True).encode())
    for name, value in sorted({**backbone.state_dict(), **dict(backbone.named_buffers())}.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _make_room(store: Path, keep: Path) -> None:
    """Delete the least recently used features if a store is too large."""
    folders = sorted((f for f in store.iterdir() if f.is_dir() and f != keep), key=lambda f: f.stat().st_mtime)
    sizes = [sum(file.stat().st_blocks * 512 for file in folder.iterdir()) for folder in folders]
    for folder, left in zip(folders, np.cumsum(sizes[::-1])[::-1], strict=True):
        if left > _MAX_BYTES:
            shutil.rmtree(folder, ignore_errors=True)


def _no_room(folder: Path, error: OSError) -> KshotError:
    return KshotError(
        f"features cannot be stored in {folder}: {error.strerror or error}. Those stored before remain; free some "
        "space, or delete that folder, and run the same command again."
    )
