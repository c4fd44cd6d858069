"""Episodes: few-shot problems drawn from the classes of one split, seeded so that any step can be drawn again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kshot.datasets import ClassImages
from kshot_runtime.errors import KshotError

Stream = Literal["train", "val", "test", "calibration"]
"""Which sequence of episodes: the same seed and step give other episodes on another stream."""

_STREAMS: dict[Stream, int] = {"train": 0, "val": 1, "test": 2, "calibration": 3}
_UNLABELLED = 4


@dataclass(frozen=True)
class Shape:
    """The size of an episode: classes, support images of each, query images of each."""

    ways: int
    shots: int
    queries: int

    def __post_init__(self) -> None:
        if self.ways < 2 or self.shots < 1 or self.queries < 1:
            raise KshotError(f"an episode needs at least 2 ways, 1 shot and 1 query; this one has {self}")

    def __str__(self) -> str:
        return f"{self.ways}-way {self.shots}-shot, {self.queries} queries"


@dataclass(frozen=True)
class Episode:
    """One few-shot problem. Support images come class by class; which class has which label is drawn at random."""

    support: Tensor  # (ways * shots, C, H, W) float in 0..1
    support_labels: Tensor  # (ways * shots,) int64
    query: Tensor  # (ways * queries, C, H, W)
    query_labels: Tensor  # (ways * queries,)
    classes: Tensor  # (ways,) int64: the labels, 0..ways-1
    source: Tensor  # (ways,) int64: which class of the split each label stands for


@dataclass(frozen=True)
class Episodes:
    """A batch of episodes of one shape."""

    shape: Shape
    support: Tensor  # (episodes, ways * shots, C, H, W) float in 0..1
    query: Tensor  # (episodes, ways * queries, C, H, W)
    source: Tensor  # (episodes, ways) int64
    unlabelled: Tensor | None = None  # (images, C, H, W): of the recipe's unlabelled pool, where it has one

    def __len__(self) -> int:
        return len(self.support)

    def __getitem__(self, i: int) -> Episode:
        classes = torch.arange(self.shape.ways, device=self.support.device)
        return Episode(
            self.support[i],
            classes.repeat_interleave(self.shape.shots),
            self.query[i],
            classes.repeat_interleave(self.shape.queries),
            classes,
            self.source[i],
        )

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Every image of the batch, support and query alike (N, C, H, W), and its class in the split (N,)."""
        images, labels = [], []
        for part, per_class in ((self.support, self.shape.shots), (self.query, self.shape.queries)):
            images.append(part.flatten(0, 1))
            labels.append(self.source.repeat_interleave(per_class, dim=1).flatten())
        return torch.cat(images), torch.cat(labels)

    def part(self, start: int, stop: int) -> Episodes:
        """Episodes start..stop of this batch."""
        support, query, source = self.support[start:stop], self.query[start:stop], self.source[start:stop]
        return Episodes(self.shape, support, query, source, self.unlabelled)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Episodes:
        """The same episodes on another device, or in another precision."""
        return Episodes(
            self.shape,
            self.support.to(device, dtype),
            self.query.to(device, dtype),
            self.source.to(device),
            None if self.unlabelled is None else self.unlabelled.to(device, dtype),
        )


def draw_indices(
    images: ClassImages, shape: Shape, count: int, *, seed: int, step: int, stream: Stream = "train"
) -> tuple[np.ndarray, np.ndarray]:
    """Which classes (count, ways) and which of their images (count, ways, shots + queries) each episode takes.

    Without replacement, so support and query are disjoint. The draw depends on (seed, stream, step) alone: a run
    that resumes at a step, or a worker that takes every n-th, gets what one uninterrupted worker would have drawn.
    """
    per_class = check_shape(images, shape)
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _STREAMS[stream], step])))
    classes = _choose(random, count, len(images), shape.ways)  # (count, ways)
    available = images.counts[classes]  # (count, ways)
    keys = random.random((count, shape.ways, int(available.max())))
    keys[np.arange(keys.shape[-1]) >= available[..., None]] = np.inf  # a smaller class has fewer images to choose from
    samples = np.argsort(keys, axis=-1)[..., :per_class]  # (count, ways, shots + queries)
    return classes, samples


def sample_episodes(
    images: ClassImages, shape: Shape, count: int, *, seed: int, step: int, stream: Stream = "train"
) -> Episodes:
    """A batch of `count` episodes as tensors, gathered from the packed images in one go."""
    classes, samples = draw_indices(images, shape, count, seed=seed, step=step, stream=stream)
    pixels = images.gather(classes[..., None], samples)  # (count, ways, shots + queries, C, H, W) uint8
    support, query = pixels[:, :, : shape.shots], pixels[:, :, shape.shots :]
    floats = [as_floats(part).flatten(1, 2) for part in (support, query)]
    return Episodes(shape, floats[0], floats[1], torch.from_numpy(classes))


def sample_images(images: ClassImages, count: int, *, seed: int, step: int) -> Tensor:
    """So many different images of any classes (all, where there are fewer), without their labels: (N, C, H, W) float.

    As with episodes, (seed, step) alone decide which.
    """
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _UNLABELLED, step])))
    ends = np.cumsum(images.counts)
    chosen = random.choice(ends[-1], min(count, ends[-1]), replace=False)  # (N,) counting through all classes
    classes = np.searchsorted(ends, chosen, side="right")
    pixels = images.gather(classes, chosen - (ends - images.counts)[classes])  # (N, C, H, W) uint8
    return as_floats(pixels)


def check_shape(images: ClassImages, shape: Shape) -> int:
    """The images that an episode takes of each class, if every class has them and there are classes enough."""
    if shape.ways > len(images):
        raise KshotError(f"{shape.ways} ways need as many classes; this split has {len(images)}. Ask for fewer ways.")
    needed = shape.shots + shape.queries
    short = np.flatnonzero(images.counts < needed)
    if len(short):
        first = int(short[0])
        others = f" (and {len(short) - 1} more classes are short)" if len(short) > 1 else ""
        raise KshotError(
            f"class {images.names[first]!r} has {images.counts[first]} images; "
            f"{shape.shots} shots + {shape.queries} queries need {needed}{others}. "
            f"Ask for fewer queries or shots, or add images."
        )
    return needed


def _choose(random: np.random.Generator, count: int, population: int, size: int) -> np.ndarray:
    """(count, size) distinct numbers below `population` in each row, in random order."""
    if population < size * size:  # redrawing rows with a repeat would take long
        return np.argsort(random.random((count, population)), axis=1)[:, :size]
    rows = random.integers(population, size=(count, size))
    while len(repeats := np.flatnonzero((np.diff(np.sort(rows, axis=1)) == 0).any(1))):
        rows[repeats] = random.integers(population, size=(len(repeats), size))
    return rows


def as_floats(pixels: np.ndarray) -> Tensor:
    """uint8 (*batch, C, H, W) as floats in 0..1 of that shape.

    Channels last: a convolution is several times faster in that layout on a CPU, and no slower on a GPU. It is
    copied into place because for one channel both layouts look alike to `contiguous`.
    """
    source = torch.from_numpy(pixels.reshape(-1, *pixels.shape[-3:]))
    floats = torch.empty(source.shape, memory_format=torch.channels_last).copy_(source).div_(255)
    return floats.unflatten(0, pixels.shape[:-3])
