"""Label spaces: the classes that users make of a few photos, and what a champion answers about them.

Each write is a revision, and tells what may be wrong with the photos that came; it never refuses them for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import IO, Literal, TypeVar

import numpy as np

from kshot_serve.errors import Problem
from kshot_serve.inference.admission import timely
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champion import Champion
from kshot_serve.models.champions import Champions
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import Settings
from kshot_serve.spaces.archive import media_type
from kshot_serve.spaces.contents import THUMBNAIL, check_bytes, check_counts, contents, picture, thumbnail
from kshot_serve.spaces.decisions import operating
from kshot_serve.spaces.names import alike, named, normal
from kshot_serve.spaces.questions import Answering, Classified, Verified
from kshot_serve.spaces.states import States, features_of, needed, pixels_by
from kshot_serve.spaces.transfer import Transfer
from kshot_serve.spaces.uploads import Decoder, Upload
from kshot_serve.spaces.writes import KEEP, Keep, Written, class_of
from kshot_serve.storage.revision import Write
from kshot_serve.storage.store import Store
from kshot_serve.storage.tables import is_id
from kshot_serve.storage.values import ORIGINAL, Class, Revision, Snapshot, Space, digest

T = TypeVar("T")
_LACKING_AT_ONCE = 256


class Spaces:
    """All label spaces of a server. No answer about one depends on another."""

    def __init__(
        self, store: Store, engine: Engine, champions: Champions, settings: Settings, metrics: Metrics
    ) -> None:
        self._store = store
        self._engine = engine
        self._champions = champions
        self._settings = settings
        self._metrics = metrics
        self.decoder = Decoder(engine, settings, metrics)
        self._answering = Answering(engine, settings, metrics, self.decoder)
        self._states = States(store, engine, metrics, settings.engine.states_mb * 1_000_000, self.decoder)
        self._transfer = Transfer(store, engine, champions, settings, self.decoder, self._answering)

    async def start(self) -> None:
        """Follow the champions, and look after the store."""
        self._store.start()
        self._champions.on_change = self.prepare_for
        self._champions.on_settled = self.settled
        await self._count()

    # Label spaces ------------------------------------------------------------------------------------------------

    async def create(self, name: str, accept: float | None = None, *, who: str = "") -> Space:
        name = named(name, "a label space")

        def write() -> Space:
            with self._store.creating(name, accept, who, self._settings.spaces) as new:
                pass
            return self._store.space(new.space)

        space = await self._write(write)
        await self._count()
        return self._shown(space)

    async def list(
        self, limit: int = 100, after: str = "", *, only: Collection[str] | None
    ) -> tuple[list[Space], str | None]:
        """Label spaces from the oldest to the newest, and the `after` of the next page, if there is one.

        `only`: those that the asker may see; none: all.
        """
        if after and not is_id(after):
            raise Problem("bad_request", "`after` is an id that a page before this one ended with")
        found = await self._store.run(self._store.spaces, limit + 1, after, only)
        return [self._shown(space) for space in found[:limit]], found[limit - 1].id if len(found) > limit else None

    async def named(self, name: str) -> Space:
        """The label space of this name; a new one if there is none."""
        space = await self._store.run(self._store.taken, normal(name))
        return await self.get(space) if space else await self.create(name, who="--space")

    async def get(self, space: str) -> Space:
        return self._shown(await self._store.run(self._store.space, space))

    async def revision(self, space: str) -> int:
        """The number of its newest revision."""
        number, _ = await self._states.revision(space)
        return number

    async def change(
        self, space: str, *, name: str | Keep = KEEP, accept: float | Keep | None = KEEP, who: str = ""
    ) -> Space:
        """Give it another name, another share of known photos to accept (none: the server's own), or both."""
        name = name if isinstance(name, Keep) else named(name, "a label space")

        def write() -> Space:
            with self._store.write(space, "change", who) as change:
                there = change.snapshot()
                if not isinstance(name, Keep) and name != there.name:
                    change.rename(name)
                if not isinstance(accept, Keep) and accept != there.accept:
                    change.accept(accept)
            return self._store.space(space)

        return self._shown(await self._write(write))

    async def delete(self, space: str) -> bool | None:
        """The label space with all its revisions and photos, for good; whether the bytes are gone from the disk."""
        _, scrubbed = await self._erase(space, partial(self._store.delete, space))
        await self._count()
        return scrubbed

    async def revisions(self, space: str, limit: int = 100, before: int | None = None) -> Sequence[Revision]:
        """The newest first."""
        return await self._store.run(self._store.revisions, space, limit, before)

    async def rollback(self, space: str, number: int, *, who: str = "") -> Written:
        """Make a new revision that equals an old one, but for what was deleted since."""

        def write() -> Written:
            with self._store.write(space, "rollback", who) as back:
                gone = back.roll_back(number)
                self._check(back.snapshot())
            return Written(back.number, gone=gone)

        return await self._write(write)

    async def export(self, space: str) -> IO[bytes]:
        """The label space as a zip, in a temporary file that is gone once closed."""
        return await self._transfer.export(space)

    async def import_(self, content: bytes, *, who: str = "", deadline: float | None = None) -> Space:
        """A label space from a zip, under new ids; where its name is taken, with a number behind it."""
        until = monotonic() + self._settings.import_s if deadline is None else deadline
        space = await self._transfer.import_(content, who, until)
        await self._count()
        return self._shown(space)

    # Classes and photos ------------------------------------------------------------------------------------------

    async def classes(self, space: str) -> tuple[int, tuple[Class, ...]]:
        """The revision, and its classes from the oldest to the newest."""
        snapshot = await self._store.run(self._store.snapshot, space)
        return snapshot.revision, snapshot.classes

    async def add_class(
        self, space: str, name: str, uploads: Sequence[Upload], *, who: str = "", deadline: float | None = None
    ) -> Written:
        """A class from one photo or more. The next answer knows it."""
        name = named(name, "a class")

        def place(write: Write, there: Snapshot) -> str:
            if any(each.name == name for each in there.classes):
                raise Problem(
                    "conflict", f"there is a class named {name!r} already: add the photos to it", reason="name"
                )
            return write.add_class(name)

        return await self._add(space, "add_class", None, place, uploads, who, deadline)

    async def add_photos(
        self, space: str, class_id: str, uploads: Sequence[Upload], *, who: str = "", deadline: float | None = None
    ) -> Written:
        def place(write: Write, there: Snapshot) -> str:
            return class_of(there, class_id).id

        return await self._add(space, "add_photos", class_id, place, uploads, who, deadline)

    async def add(
        self, space: str, name: str, uploads: Sequence[Upload], *, who: str = "", deadline: float | None = None
    ) -> Written:
        """Photos of the class of this name, which is made if need be."""
        name = named(name, "a class")

        def known(classes: Sequence[Class]) -> str | None:
            return next((each.id for each in classes if each.name == name), None)

        def place(write: Write, there: Snapshot) -> str:
            return known(there.classes) or write.add_class(name)

        _, classes = await self.classes(space)
        return await self._add(space, "add_photos", known(classes), place, uploads, who, deadline)

    async def rename_class(self, space: str, class_id: str, name: str, *, who: str = "") -> Written:
        name = named(name, "a class")

        def write() -> Written:
            with self._store.write(space, "rename_class", who) as change:
                there = change.snapshot()
                class_ = class_of(there, class_id)
                if any(each.name == name and each.id != class_id for each in there.classes):
                    raise Problem("conflict", f"another class is named {name!r}", reason="name")
                if class_.name != name:
                    change.rename_class(class_id, name)
            notes = alike(name, [each.name for each in there.classes if each.id != class_id])
            return Written(change.revision, replace(class_, name=name), notes=tuple(notes))

        return await self._write(write)

    async def delete_class(self, space: str, class_id: str, *, who: str = "") -> Written:
        """The class and its photos, in all revisions, for good."""

        def write() -> Written:
            with self._store.write(space, "delete_class", who) as change:
                change.delete_class(class_id)
            return Written(change.revision)

        written, scrubbed = await self._erase(space, write)
        return replace(written, scrubbed=scrubbed)

    async def delete_photo(self, space: str, photo_id: str, *, who: str = "") -> Written:
        """The photo, in all revisions, for good. Its class stays, also without photos; it is then no answer."""

        def write() -> Written:
            with self._store.write(space, "delete_photo", who) as change:
                change.delete_photo(photo_id)
            return Written(change.revision)

        written, scrubbed = await self._erase(space, write)
        return replace(written, scrubbed=scrubbed)

    async def photo_facts(self, space: str, photo_id: str) -> tuple[str, int]:
        """A tag that changes with what `photo` gives, and its bytes, nearly; to ask costs no reading of the photo."""
        sha256, size, kept = await self._store.run(self._store.photo_facts, space, photo_id)
        rule = self._champions.current.bundle.manifest.image
        return sha256 if kept else f"{sha256}-{pixels_by(rule)[1][:16]}", size

    async def photo(self, space: str, photo_id: str) -> tuple[bytes, str]:
        """A photo as it came, or as it is seen if that was not kept: the file and its media type."""
        rule = self._champions.current.bundle.manifest.image
        kept = await self._store.run(self._store.photo, space, photo_id, [ORIGINAL, pixels_by(rule)])
        content = await self._engine.in_thread(picture, kept, rule)
        return content, media_type(content)

    async def thumbnail(self, space: str, photo_id: str) -> bytes:
        """The middle of a photo as a JPEG of 160 x 160 pixels, upright and without metadata."""
        content, _ = await self.photo(space, photo_id)
        [photo] = await self.decoder.read_all([content], THUMBNAIL, kept=True)
        return await self._engine.in_thread(thumbnail, photo.pixels)

    async def _add(
        self,
        space: str,
        action: Literal["add_class", "add_photos"],
        class_id: str | None,
        place: Callable[[Write, Snapshot], str],
        uploads: Sequence[Upload],
        who: str,
        deadline: float | None,
    ) -> Written:
        until = monotonic() + self._settings.engine.deadline_s if deadline is None else deadline
        champion = self._champions.current
        async with timely(until):
            await self.revision(space)  # before any work is done for one that is not there
            query = await self._answering.query(champion, uploads, until, as_support=True)
            strange = await self._states.closer(champion, space, class_id, query.images, query.features, until)
            kept = await self._engine.in_thread(contents, champion, uploads, query, self._settings)

        def write() -> Written:
            with self._store.write(space, action, who) as change:
                there = change.snapshot()
                class_ = place(change, there)
                names = {each.id: each.name for each in there.classes}
                holders: dict[str, list[str]] = {}  # which classes have a file, by its sha256
                for photo in there.photos:
                    holders.setdefault(photo.sha256, []).append(photo.class_id)
                notes: list[str] = []
                added: list[str] = []
                for number, (upload, each, closer) in enumerate(zip(uploads, kept, strange, strict=True), 1):
                    sha256 = digest(upload.content)
                    others = holders.setdefault(sha256, [])
                    if class_ in others:
                        notes.append(f"photo {number} is in this class already, and was left out")
                        continue
                    if others:
                        notes.append(f"photo {number} is also in class {names[others[0]]!r}")
                    elif closer:
                        notes.append(f"photo {number} is closer to class {closer!r}")
                    added.append(change.add_photo(class_, sha256, each))
                    others.append(class_)
                there = change.snapshot()
                self._check(there)
                check_bytes(change, self._settings.space_mb)
            made = class_of(there, class_)
            twins = [] if class_ in names else alike(made.name, names.values())
            return Written(change.revision, made, tuple(added), (*twins, *notes))

        return await self._write(write)

    def _check(self, there: Snapshot) -> None:
        """A label space must fit what the bundle adapts to."""
        limits = self._champions.current.bundle.manifest.limits
        check_counts(limits, [len(each.photos) for each in there.classes])

    # Questions ---------------------------------------------------------------------------------------------------

    async def classify(self, space: str, uploads: Sequence[Upload], deadline: float) -> Classified:
        """What each photo shows, judged by itself.

        The evidence are the support photos that are nearest, by the features that the adapted learner sees; none if
        it makes none.
        """
        champion = self._champions.current
        adapted = await self._states.get(champion, space)
        query = await self._answering.query(champion, uploads, deadline)
        return await self._answering.classify(champion, adapted, query, deadline)

    async def embed(self, uploads: Sequence[Upload], deadline: float) -> tuple[np.ndarray, Champion]:
        """The photos' features (N, D), each by itself."""
        champion = self._champions.current
        return await self._answering.embed(champion, uploads, deadline), champion

    async def verify(self, a: Upload, b: Upload, deadline: float) -> Verified:
        """Whether two photos show one class; in either order the answer is the same."""
        return await self._answering.verify(self._champions.current, a, b, deadline)

    # Champions ---------------------------------------------------------------------------------------------------

    async def prepare_for(self, champion: Champion) -> None:
        """Make what a champion to be needs of every photo, beside what serves; a Problem refuses it.

        Ids sort by time, so photos that come meanwhile are met at the end; one that comes later still is prepared
        when its label space is next asked.
        """
        manifest = champion.bundle.manifest
        limits = manifest.limits
        for came, most, what in zip(
            await self._store.run(self._store.largest),
            (limits.ways, limits.shots, limits.support),
            ("classes", "photos of one class", "photos"),
            strict=True,
        ):
            if came > most:
                message = f"a label space has {came} {what}, and this bundle adapts to at most {most}"
                raise Problem("not_supported", message, reason="limits")
        if await self._store.run(self._store.lacking, [pixels_by(manifest.image), ORIGINAL], 1):
            raise Problem(
                "not_supported",
                "this bundle takes photos in another size or way than they were kept in, and their originals were not "
                "kept: serve a bundle with the same image rule, or start afresh and keep photos",
                reason="image",
            )
        after = ""
        while photos := await self._store.run(self._store.lacking, [needed(champion)], _LACKING_AT_ONCE, after):
            await self._states.fill(champion, photos)
            after = photos[-1]
        await self._states.warm(champion)

    async def settled(self, champion: Champion) -> None:
        """Forget what only older champions needed."""
        self._states.keep_only(champion.id)
        features = features_of(champion) if champion.bundle.manifest.takes == "features" else None
        await self._store.run_writing(self._store.settle, pixels_by(champion.bundle.manifest.image), features)

    # The store ---------------------------------------------------------------------------------------------------

    async def _write(self, write: Callable[[], T]) -> T:
        """A write, which ends even if the caller has gone."""
        return await asyncio.shield(asyncio.create_task(self._store.run_writing(write)))

    async def _erase(self, space: str, write: Callable[[], T]) -> tuple[T, bool | None]:
        """A write that deletes for good, from memory too; what it gave, and whether its bytes are off the disk."""
        task = asyncio.create_task(self._store.run_writing(self._store.erasing, write))
        task.add_done_callback(lambda _: self._states.drop(space))
        return await asyncio.shield(task), await self._store.scrubbed()

    async def _count(self) -> None:
        self._metrics.spaces.set(await self._store.run(self._store.count))

    def _shown(self, space: Space) -> Space:
        """With what is in force: the share asked for, and what the threshold did on validation at such a size."""
        space = replace(space, accept=self._settings.accept if space.accept is None else space.accept)
        if not self._champions.ready:
            return space
        manifest, ways = self._champions.current.bundle.manifest, max(1, space.classes)
        calibration = manifest.calibration_for(ways, space.photos / ways)
        point = operating(calibration, manifest.verification, ways, space.accept)
        return replace(space, accepted=point.accepted, false_accepts=point.false_accepts) if point else space
