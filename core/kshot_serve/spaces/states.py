"""The adapted state of a label space at a revision under a bundle: built once, kept while there is room, dropped.

It is made of what the store keeps of each photo: features where the bundle takes them, else pixels. What a photo lacks,
because another champion served when it came, is made here and kept.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from time import monotonic

import numpy as np

from kshot_runtime.bundle import Tensors
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import Manifest
from kshot_serve.errors import Problem
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champion import Champion
from kshot_serve.observe.metrics import Metrics
from kshot_serve.spaces.decisions import by_features, closer, unit
from kshot_serve.spaces.revisions import Revisions
from kshot_serve.spaces.uploads import Decoder
from kshot_serve.storage.store import Store
from kshot_serve.storage.values import ORIGINAL, Class, Key, Photo, Snapshot

_AT_ONCE = 64  # photos that are decoded and embedded together
_PATIENCE_S = 300.0  # for what a state needs beside adapting; a request that waits for it has a deadline of its own
_PHOTO_BYTES = 600  # of memory, roughly, for what a state says of a photo


@dataclass(frozen=True, eq=False)
class Adapted:
    """A bundle adapted to a label space, and what it takes to explain its answers."""

    space: str
    revision: int
    bundle: str
    accept: float | None
    tensors: Tensors
    classes: tuple[Class, ...]  # (W,) in the order of the logits; those with photos
    photos: tuple[Photo, ...]  # (S,)
    directions: np.ndarray | None  # (S, D) unit rows, the photos' features as the adapted learner sees them
    alone: np.ndarray | None  # (S, D) features of images by themselves, if one class is told from all else by them
    stale: bool = False  # whether there may be a later revision: the database is away

    @cached_property
    def names(self) -> tuple[tuple[str, str], ...]:
        """Id and name of each class."""
        return tuple((each.id, each.name) for each in self.classes)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.space, self.bundle, self.revision

    @property
    def shots(self) -> float:
        return len(self.photos) / len(self.classes)

    @property
    def size(self) -> int:
        arrays = [*self.tensors.values(), self.directions, self.alone]
        return sum(array.nbytes for array in arrays if array is not None) + _PHOTO_BYTES * len(self.photos)


class States:
    """Adapted states in memory, the least used of which go when there is no more room."""

    def __init__(self, store: Store, engine: Engine, metrics: Metrics, room: int, decoder: Decoder) -> None:
        self._store = store
        self._revisions = Revisions(store)
        self._engine = engine
        self._metrics = metrics
        self._room = room
        self._decoder = decoder
        self._kept: OrderedDict[tuple[str, str], Adapted] = OrderedDict()  # by space and bundle, the least used first
        self._used = 0
        self._building: dict[tuple[str, str, int], asyncio.Task[Adapted]] = {}

    async def revision(self, space: str) -> tuple[int, bool]:
        """The newest revision of a label space, and whether it is only the last known, for the database is away."""
        try:
            return await self._revisions.get(space)
        except Problem as problem:
            if problem.code == "space_unknown":
                self.drop(space)  # another replica deleted it
            raise

    async def get(self, champion: Champion, space: str) -> Adapted:
        """The state of a label space as it is now. Many may ask: it is built once."""
        revision, stale = await self.revision(space)
        if adapted := self.at_hand(champion, space, revision):
            return replace(adapted, stale=True) if stale else adapted
        key = space, champion.id, revision
        if key not in self._building:
            self._building[key] = task = asyncio.create_task(self._made(champion, key))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # all who asked may have gone
        return await asyncio.shield(self._building[key])

    def at_hand(self, champion: Champion, space: str, revision: int) -> Adapted | None:
        """The state of this revision or a later one, if it need not be built."""
        adapted = self._kept.get((space, champion.id))
        if adapted is None or adapted.revision < revision:
            return None
        self._kept.move_to_end((space, champion.id))
        return adapted

    async def closer(
        self,
        champion: Champion,
        space: str,
        class_id: str | None,
        images: np.ndarray,
        features: np.ndarray | None,
        until: float,
    ) -> Sequence[str | None]:
        """For each photo, the name of another class that it is clearly closer to than to its own class's other photos.

        Where the bundle takes images this is told only while the label space's state is in memory: to adapt just for
        a note could take longer than the write.
        """
        nothing = [None] * len(images)
        try:
            if features is not None:
                adapted = await self.get(champion, space)
            elif (at_hand := self.at_hand(champion, space, 0)) is not None:
                adapted = at_hand
                outputs = await self._engine.classify(champion, adapted.tensors, adapted.key, images, until)
                features = outputs.get("query_features")
            else:
                return nothing
        except Problem:  # there are no classes yet; and whatever else it is, a note is not worth refusing for
            return nothing
        if features is None or adapted.directions is None:
            return nothing
        ends = np.cumsum([len(each.photos) for each in adapted.classes])
        rows = list(zip(adapted.classes, np.split(adapted.directions, ends[:-1]), strict=True))
        own = next((part for each, part in rows if each.id == class_id), adapted.directions[:0])
        others = [(each.name, part) for each, part in rows if each.id != class_id]
        found = closer(unit(features), own, [part for _, part in others])
        return [None if i is None else others[i][0] for i in found]

    async def warm(self, champion: Champion) -> None:
        """Build the states of a champion to be, of the label spaces in use, in half of the room."""
        size = 0
        for space in list(dict.fromkeys(space for space, _ in reversed(self._kept))):
            try:
                size += (await self.get(champion, space)).size
            except Problem:  # it was deleted meanwhile, or emptied
                continue
            if size > self._room / 2:
                break

    def drop(self, space: str) -> None:
        """Forget a label space, also where it is being adapted to."""
        for key in [key for key in self._kept if key[0] == space]:
            self._forget(key)
        for building in [key for key in self._building if key[0] == space]:
            del self._building[building]

    def keep_only(self, bundle: str) -> None:
        """Forget the states of other bundles."""
        for key in [key for key in self._kept if key[1] != bundle]:
            self._forget(key)

    async def fill(self, champion: Champion, photos: Sequence[str]) -> None:
        """Make what adapting needs of these photos, and keep it."""
        manifest = champion.bundle.manifest
        for i in range(0, len(photos), _AT_ONCE):
            pixels = await self._pixels(manifest.image, photos[i : i + _AT_ONCE])
            if pixels and manifest.takes == "features":
                vectors = await self._engine.embed_support(champion, np.stack(list(pixels.values())))
                features = dict(zip(pixels, map(np.ndarray.tobytes, vectors), strict=True))
                await self._store.run_writing(self._store.keep, features_of(champion), features)

    async def _pixels(self, rule: ImageRule, photos: Sequence[str]) -> dict[str, np.ndarray]:
        """The photos by this rule, decoded again if that is not how they are kept."""
        key = pixels_by(rule)
        pixels = {
            photo: np.frombuffer(content, np.uint8).reshape(rule.shape)
            for photo, content in (await self._store.run(self._store.contents, photos, key)).items()
        }
        if lacking := [photo for photo in photos if photo not in pixels]:
            originals = await self._store.run(self._store.contents, lacking, ORIGINAL)
            again = dict(zip(originals, await self._again(list(originals.values()), rule), strict=True))
            contents = {photo: image.tobytes() for photo, image in again.items()}
            await self._store.run_writing(self._store.keep, key, contents)
            pixels |= again
        return pixels

    async def _again(self, photos: Sequence[bytes], rule: ImageRule) -> list[np.ndarray]:
        try:
            return [upload.pixels for upload in await self._decoder.read_all(photos, rule, kept=True)]
        except Problem as problem:
            raise Problem("not_supported", f"a photo that was taken once is refused now: {problem}") from None

    async def _made(self, champion: Champion, key: tuple[str, str, int]) -> Adapted:
        try:
            adapted = await self._build(champion, key[0])
            if self._building.get(key) is asyncio.current_task():  # else it was dropped meanwhile
                self._keep(adapted)
            return adapted
        finally:
            if self._building.get(key) is asyncio.current_task():
                del self._building[key]

    async def _build(self, champion: Champion, space: str) -> Adapted:
        manifest = champion.bundle.manifest
        if (before := self._kept.get((space, champion.id))) is not None:
            snapshot = await self._store.run(self._store.snapshot, space)
            if _support(snapshot.classes) == _support(before.classes):  # names and the like changed, no more
                classes = tuple(each for each in snapshot.classes if each.photos)
                return replace(before, revision=snapshot.revision, accept=snapshot.accept, classes=classes)
        snapshot, support = await self._support(champion, space)
        classes = tuple(each for each in snapshot.classes if each.photos)
        if not classes:
            raise Problem("too_few_classes", "this label space has no class with photos yet: add one")
        photos = tuple(photo for each in classes for photo in each.photos)
        rows = np.stack([support[photo.id] for photo in photos])
        labels = np.repeat(np.arange(len(classes)), [len(each.photos) for each in classes])
        tensors = await self._engine.adapt(champion, rows, labels, np.arange(len(classes)))
        seen: np.ndarray | None = rows  # if these are features
        alone = rows
        if manifest.takes == "images":
            until, key = monotonic() + _PATIENCE_S, (space, champion.id, snapshot.revision)
            seen = (await self._engine.classify(champion, tensors, key, rows, until)).get("query_features")
            if by_features(manifest.verification, len(classes)):
                alone = await self._engine.embed(champion, rows, until)
        return Adapted(
            space,
            snapshot.revision,
            champion.id,
            snapshot.accept,
            tensors,
            classes,
            photos,
            None if seen is None else unit(seen),
            alone if by_features(manifest.verification, len(classes)) else None,
        )

    async def _support(self, champion: Champion, space: str) -> tuple[Snapshot, dict[str, np.ndarray]]:
        """A label space, and of each photo what adapting takes."""
        key = needed(champion)
        for _ in range(3):  # a photo may be added meanwhile, by a server that has another champion
            snapshot, contents = await self._store.run(self._store.support, space, key)
            lacking = [photo.id for photo in snapshot.photos if photo.id not in contents]
            if not lacking:
                return snapshot, {photo: _array(champion, content) for photo, content in contents.items()}
            await self.fill(champion, lacking)
        raise Problem(
            "not_supported",
            "some photos of this label space cannot be prepared for the model that serves, because it takes them in "
            "another size or way and their originals were not kept: add them again",
        )

    def _keep(self, adapted: Adapted) -> None:
        key = adapted.space, adapted.bundle
        if key in self._kept:
            if self._kept[key].revision > adapted.revision:
                return
            self._forget(key)
        self._kept[key] = adapted
        self._used += adapted.size
        while self._used > self._room and len(self._kept) > 1:
            self._forget(next(iter(self._kept)))
        self._metrics.state_bytes.set(self._used)

    def _forget(self, key: tuple[str, str]) -> None:
        adapted = self._kept.pop(key)
        self._engine.forget(adapted.key)
        self._used -= adapted.size
        self._metrics.state_bytes.set(self._used)


def _support(classes: Sequence[Class]) -> list[tuple[str, list[str]]]:
    return [(each.id, [photo.id for photo in each.photos]) for each in classes if each.photos]


def pixels_by(rule: ImageRule) -> Key:
    return "pixels", hashlib.sha256(rule.model_dump_json().encode()).hexdigest()[:16]


def features_of(champion: Champion) -> Key:
    return "features", champion.id


def needed(champion: Champion) -> Key:
    """What adapting takes of a photo."""
    manifest = champion.bundle.manifest
    return features_of(champion) if manifest.takes == "features" else pixels_by(manifest.image)


def _array(champion: Champion, content: bytes) -> np.ndarray:
    manifest: Manifest = champion.bundle.manifest
    if manifest.takes == "features":
        return np.frombuffer(content, np.float32)
    return np.frombuffer(content, np.uint8).reshape(manifest.image.shape)
