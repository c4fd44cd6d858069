"""Episodes: few-shot problems drawn from the classes of a split; a seed and a step number determine a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kshot.data.datasets import ClassImages, Groups
from kshot_runtime.errors import KshotError

Stream = Literal["train", "val", "test", "calibration"]
"""Selects a sequence of episodes: streams with equal seeds and steps are independent."""

_STREAMS: dict[Stream, int] = {"train": 0, "val": 1, "test": 2, "calibration": 3}
_UNLABELLED = 4


@dataclass(frozen=True)
class Shape:
    """The size of an episode: classes, and support and query images of each class."""

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
    """One few-shot problem. Images are sorted by label; which class has which label is random."""

    support: Tensor  # (ways * shots, C, H, W) float in 0..1
    support_labels: Tensor  # (ways * shots,) int64
    query: Tensor  # (ways * queries, C, H, W)
    query_labels: Tensor  # (ways * queries,)
    classes: Tensor  # (ways,) int64: the labels, 0..ways-1
    source: Tensor  # (ways,) int64: the class of the split for each label


@dataclass(frozen=True)
class Episodes:
    """A batch of episodes of one shape."""

    shape: Shape
    support: Tensor  # (episodes, ways * shots, C, H, W) float in 0..1
    query: Tensor  # (episodes, ways * queries, C, H, W)
    source: Tensor  # (episodes, ways) int64
    unlabelled: Tensor | None = None  # (images, C, H, W), if the recipe has unlabelled images

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
        """The same episodes on another device, or in another precision. A GPU is not waited for."""
        late = torch.device(device).type == "cuda"
        return Episodes(
            self.shape,
            self.support.to(device, dtype, late),
            self.query.to(device, dtype, late),
            self.source.to(device, non_blocking=late),
            None if self.unlabelled is None else self.unlabelled.to(device, dtype, late),
        )


def draw_indices(
    images: ClassImages, shape: Shape, count: int, *, seed: int, step: int, stream: Stream = "train"
) -> tuple[np.ndarray, np.ndarray]:
    """The classes (count, ways) and the numbers of their images (count, ways, shots + queries) in each episode.

    Drawn without replacement, so support and query are disjoint. Across groups, the support of a class comes from one
    random group, and its queries from the others. The draw depends on (seed, stream, step) only, so a run resumed at a
    step draws the same episodes.
    """
    check_shape(images, shape)
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _STREAMS[stream], step])))
    classes = _distinct(random, np.full(count, len(images)), shape.ways)  # (count, ways)
    total = images.counts[classes]  # (count, ways)
    if images.protocol == "random photos":
        return classes, _distinct(random, total, shape.shots + shape.queries)  # (count, ways, shots + queries)
    groups, able = _able_to_support(images, shape)
    first, last = (np.searchsorted(groups.klass[able], classes, side) for side in ("left", "right"))
    chosen = able[random.integers(first, last)]  # (count, ways)
    start, size = groups.start[chosen], groups.size[chosen]
    support = start[..., None] + _distinct(random, size, shape.shots)
    query = (start + size)[..., None] + _distinct(random, total - size, shape.queries)  # wraps to the first group
    places = np.concatenate([support, query % total[..., None]], axis=-1)  # (count, ways, shots + queries)
    return classes, groups.order[(np.cumsum(images.counts) - images.counts)[classes][..., None] + places]


def sample_episodes(
    images: ClassImages, shape: Shape, count: int, *, seed: int, step: int, stream: Stream = "train"
) -> Episodes:
    """A batch of `count` episodes; see `draw_indices`. A KshotError if the classes are too few or too small."""
    classes, samples = draw_indices(images, shape, count, seed=seed, step=step, stream=stream)
    support = images.gather(classes[..., None], samples[..., : shape.shots], support=True)  # (count, ways, shots, ...)
    query = images.gather(classes[..., None], samples[..., shape.shots :])  # (count, ways, queries, C, H, W) uint8
    floats = [as_floats(part).flatten(1, 2) for part in (support, query)]
    return Episodes(shape, floats[0], floats[1], torch.from_numpy(classes))


def sample_images(images: ClassImages, count: int, *, seed: int, step: int) -> Tensor:
    """`count` different images of any classes (or all, if there are fewer): (N, C, H, W) float.

    The draw depends on (seed, step) only.
    """
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _UNLABELLED, step])))
    ends = np.cumsum(images.counts)
    chosen = random.choice(ends[-1], min(count, ends[-1]), replace=False)  # (N,) indices over the images of all classes
    classes = np.searchsorted(ends, chosen, side="right")
    pixels = images.gather(classes, chosen - (ends - images.counts)[classes])  # (N, C, H, W) uint8
    return as_floats(pixels)


def check_shape(images: ClassImages, shape: Shape, settings: tuple[str, str] = ("ways={}", "queries={}")) -> None:
    """A KshotError if episodes of this shape cannot be drawn from these classes; `settings` names those to change."""
    ways, queries = settings
    if shape.ways > len(images):
        remedy = f"Set {ways.format(len(images))}, or add classes." if len(images) > 1 else "Add classes."
        raise KshotError(f"{shape.ways} ways need as many classes; this split has {len(images)}. {remedy}")
    needed = shape.shots + shape.queries
    short = np.flatnonzero(images.counts < needed)
    if len(short):
        spare = int(images.counts.min()) - shape.shots
        raise KshotError(
            f"class {images.names[short[0]]!r} has {images.counts[short[0]]} images; "
            f"{shape.shots} shots + {shape.queries} queries need {needed}{_more_classes(short)}. "
            f"{f'Set {queries.format(spare)}' if spare > 0 else 'Ask for fewer shots'}, or add images."
        )
    if images.protocol == "across groups":
        groups, able = _able_to_support(images, shape)
        short = np.setdiff1d(np.arange(len(images)), groups.klass[able])
        if len(short):
            sizes = groups.size[groups.klass == short[0]]
            raise KshotError(
                f"class {images.names[short[0]]!r} has {len(sizes)} groups of {sizes.min()} to {sizes.max()} images; "
                f"{shape.shots} shots of one and {shape.queries} queries of others are too many{_more_classes(short)}. "
                "Ask for fewer shots or queries, add images of other groups, or set dataset.across_groups=false."
            )


def protocols(images: ClassImages, shape: Shape) -> list[ClassImages]:
    """The same classes under each protocol that allows episodes of `shape`, their current one first."""
    other = images.with_protocol("across groups" if images.protocol == "random photos" else "random photos")
    try:
        check_shape(other, shape)
    except KshotError:
        return [images]
    return [images, other]


def _able_to_support(images: ClassImages, shape: Shape) -> tuple[Groups, np.ndarray]:
    """The groups, and the numbers of those with enough images for the support that leave enough others for queries."""
    if (groups := images.groups) is None:
        raise KshotError(
            "episodes across groups need the group of every image, and these have none: import them again with "
            "--group-by, or set dataset.across_groups=false"
        )
    others = images.counts[groups.klass] - groups.size
    return groups, np.flatnonzero((groups.size >= shape.shots) & (others >= shape.queries))


def _more_classes(short: np.ndarray) -> str:
    return f" (and {len(short) - 1} more classes are short)" if len(short) > 1 else ""


def _distinct(random: np.random.Generator, populations: np.ndarray, size: int) -> np.ndarray:
    """For each of populations (*batch,), `size` distinct numbers below it, in random order: (*batch, size).

    Floyd's algorithm, which needs `size` random numbers for any population.
    """
    chosen = np.empty((*populations.shape, size), np.int64)
    for i in range(size):
        last = populations - size + i  # (*batch,)
        drawn = random.integers(last + 1)
        taken = (chosen[..., :i] == drawn[..., None]).any(-1)
        chosen[..., i] = np.where(taken, last, drawn)
    return random.permuted(chosen, axis=-1)


def as_floats(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 (*batch, C, H, W) as floats in 0..1 of the same shape and device; features (*batch, D) unchanged.

    In channels-last layout, in which convolutions are several times faster on a CPU. Copied into an empty tensor of
    that layout, since `contiguous` does not change the strides of images with one channel.
    """
    source = pixels if isinstance(pixels, Tensor) else torch.from_numpy(pixels)
    if source.dtype != torch.uint8:
        return source
    flat = source.flatten(0, -4)  # (N, C, H, W)
    floats = torch.empty(flat.shape, device=flat.device, memory_format=torch.channels_last).copy_(flat).div_(255)
    return floats.unflatten(0, source.shape[:-3])
