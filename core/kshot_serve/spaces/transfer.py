"""Label spaces as zips: out of one server and into another."""

from __future__ import annotations

import asyncio
from typing import IO

from kshot_serve.errors import Problem
from kshot_serve.inference.admission import timely
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champions import Champions
from kshot_serve.settings import Settings
from kshot_serve.spaces import archive
from kshot_serve.spaces.contents import check_bytes, contents, picture
from kshot_serve.spaces.names import named, numbered
from kshot_serve.spaces.questions import Answering
from kshot_serve.spaces.states import pixels_by
from kshot_serve.spaces.uploads import Decoder
from kshot_serve.storage.store import Store
from kshot_serve.storage.values import ORIGINAL, Key, Space


class Transfer:
    """Exports and imports label spaces."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        champions: Champions,
        settings: Settings,
        decoder: Decoder,
        answering: Answering,
    ) -> None:
        self._store = store
        self._engine = engine
        self._champions = champions
        self._settings = settings
        self._decoder = decoder
        self._answering = answering

    async def export(self, space: str) -> IO[bytes]:
        """A label space as a zip, in a temporary file that is gone once closed."""
        champion = self._champions.current
        snapshot = await self._store.run(self._store.snapshot, space)
        rule = champion.bundle.manifest.image

        def photo(id_: str) -> bytes | None:
            try:
                return picture(self._store.photo(space, id_, [ORIGINAL, pixels_by(rule)]), rule)
            except Problem as problem:
                if problem.code == "photo_unknown":
                    return None
                raise

        model = archive.Model(name=champion.name, version=champion.version, bundle=champion.id, image=rule)
        return await asyncio.to_thread(archive.pack, snapshot, photo, model)

    async def import_(self, content: bytes, who: str, deadline: float) -> Space:
        """A label space from a zip, under new ids; where its name is taken, with a number behind it."""
        champion = self._champions.current
        most = archive.Most(
            self._settings.image.max_bytes, self._settings.space_mb * 1_000_000, champion.bundle.manifest.limits
        )
        async with timely(deadline):
            packed, photos = await self._engine.in_thread(archive.unpack, content, most)
            wanted = named(packed.name, "a label space")
            names = [named(each.name, "a class") for each in packed.classes]
            if len(set(names)) < len(names):
                raise Problem("conflict", "two classes in the archive have one name", reason="name")
            kept: dict[str, dict[Key, bytes]] = {}
            if photos:
                with self._engine.admission.admit(min(len(photos), self._settings.photos)):
                    rule = champion.bundle.manifest.image
                    uploads = await self._decoder.read_all(list(photos.values()), rule, list(photos))
                    query = await self._answering.query(champion, uploads, deadline, as_support=True)
                    made = await self._engine.in_thread(contents, champion, uploads, query, self._settings)
                    kept = dict(zip(photos, made, strict=True))

        def write() -> Space:
            name = next(name for name in numbered(wanted) if not self._store.taken(name))
            with self._store.creating(name, packed.accept, who, self._settings.spaces, "import") as new:
                for name, each in zip(names, packed.classes, strict=True):
                    class_ = new.add_class(name)
                    for photo in each.photos:
                        new.add_photo(class_, photo.sha256, kept[photo.file])
                check_bytes(new, self._settings.space_mb)
            return self._store.space(new.space)

        return await asyncio.shield(asyncio.create_task(self._store.run_writing(write)))
