"""Learners that ask nothing of an image but its features: found out by trying, and played without the images.

Most learners with `norm = "running"` or `"group"` are such. Their evaluation embeds each image once, however many
episodes it is in, and their bundles adapt to features that a server has kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kshot.datasets import ClassImages
from kshot.episodes import Episode, Episodes, Shape, Stream, as_floats, draw_indices, sample_episodes
from kshot.learner import EMBEDDING, Learner
from kshot.norms import BY_ITSELF

_AT_ONCE = 64  # images embedded together, at most: of 84 x 84 pixels, a layer's maps then take 115 MB


class Sampler(Protocol):
    """`sample_episodes` for one learner: its episodes hold features in the place of images where that is enough."""

    def __call__(self, shape: Shape, count: int, *, seed: int, step: int, stream: Stream) -> Episodes: ...


@contextmanager
def evaluating(
    learner: Learner, images: ClassImages, shape: Shape, *, brief: bool = True, device: str = "cpu"
) -> Iterator[Sampler]:
    """Put a learner into eval mode, and give the sampler that its episodes come from meanwhile.

    If it is `brief`, and features are all that the learner needs (`sees_features_only`, tried on an episode of
    `shape`), episodes hold them, each image is embedded once in all, and `learner.embed` passes features on.
    """
    was_training = learner.training
    learner.eval()
    try:
        if brief and sees_features_only(learner, _first(images, shape).to(device)[0]):
            embedded = _Embedded(learner.embed, images, device)
            with embedding_by(learner, as_it_is):
                yield embedded.sample
        else:

            def sample(shape: Shape, count: int, *, seed: int, step: int, stream: Stream) -> Episodes:
                return sample_episodes(images, shape, count, seed=seed, step=step, stream=stream).to(device)

            yield sample
    finally:
        learner.train(was_training)


@torch.no_grad()
def sees_features_only(learner: Learner, episode: Episode) -> bool:
    """Whether `embed` of an image by itself is all that adapting and classifying ever ask of it."""
    if learner.config.norm not in BY_ITSELF:
        return False
    state = learner.adapt(episode.support, episode.support_labels, episode.classes)
    if any(name.startswith(EMBEDDING) for name in state):
        return False
    support, query = learner.embed(episode.support), learner.embed(episode.query)
    expected = learner.classify(state, episode.query)
    try:
        with embedding_by(learner, as_it_is):
            again = learner.adapt(support, episode.support_labels, episode.classes)
            logits = learner.classify(again, query)
    except Exception:  # its code expects images, and may fail in any way
        return False
    same = set(again) == set(state) and logits.shape == expected.shape
    return same and bool(torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())))


@contextmanager
def embedding_by(learner: Learner, embed: Callable[..., Tensor]) -> Iterator[None]:
    """Put another function into the place of a learner's `embed`."""
    before = vars(learner).get("embed")
    vars(learner)["embed"] = embed
    try:
        yield
    finally:
        del vars(learner)["embed"]
        if before is not None:
            vars(learner)["embed"] = before


def as_it_is(features: Tensor, state: Mapping[str, Tensor] | None = None) -> Tensor:
    """The `embed` of one that is given features."""
    return features


def _first(images: ClassImages, shape: Shape) -> Episodes:
    return sample_episodes(images, shape, 1, seed=0, step=0, stream="calibration")


class _Embedded:
    """A split's features: each image is embedded when an episode first holds it."""

    def __init__(self, embed: Callable[[Tensor], Tensor], images: ClassImages, device: str) -> None:
        self._embed, self._images, self._device = embed, images, device
        self._ends = np.cumsum(images.counts)
        self._known = np.zeros(self._ends[-1], bool)  # (images of the split,)
        self._features = torch.empty(0)  # (images of the split, D), once the first are there

    def sample(self, shape: Shape, count: int, *, seed: int, step: int, stream: Stream) -> Episodes:
        classes, samples = draw_indices(self._images, shape, count, seed=seed, step=step, stream=stream)
        numbers = (self._ends - self._images.counts)[classes][..., None] + samples  # (count, ways, shots + queries)
        self._learn(np.unique(numbers))
        features = self._features[torch.from_numpy(numbers).to(self._device)]  # (count, ways, shots + queries, D)
        support, query = features[:, :, : shape.shots], features[:, :, shape.shots :]
        return Episodes(shape, support.flatten(1, 2), query.flatten(1, 2), torch.from_numpy(classes).to(self._device))

    @torch.no_grad()
    def _learn(self, numbers: np.ndarray) -> None:
        """Embed those of these images, counted through all classes, that are not known yet."""
        new = numbers[~self._known[numbers]]
        for start in range(0, len(new), _AT_ONCE):
            part = new[start : start + _AT_ONCE]
            classes = np.searchsorted(self._ends, part, side="right")
            pixels = self._images.gather(classes, part - (self._ends - self._images.counts)[classes])
            features = self._embed(as_floats(pixels).to(self._device))  # (part, D)
            if not self._features.numel():
                self._features = features.new_empty(len(self._known), features.shape[1])
            self._features[torch.from_numpy(part).to(self._device)] = features
        self._known[new] = True
