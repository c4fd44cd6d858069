"""The database of a server: its transactions, the threads that wait for it, its upkeep, and the keys of its photos."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from sqlalchemy import Connection, Row, func, select

from kshot_runtime.errors import KshotError
from kshot_serve.errors import Problem
from kshot_serve.observe.metrics import Metrics
from kshot_serve.storage.engines import LOOKING, READING, THREADS, away, opened, telling
from kshot_serve.storage.health import Health
from kshot_serve.storage.photo_keys import KeyChanges, PhotoKeys, decrypted, unreadable
from kshot_serve.storage.tables import CLASSES, PHOTOS, SPACES, new_id
from kshot_serve.storage.upkeep import SqliteFile, Upkeep
from kshot_serve.storage.values import Key, parts

LEASE_S = 0.03
"""For how long a server may answer with what Postgres said of a revision; a write waits as long after its commit."""

_SOON_S = 1.0  # for a question to wait for the database
_SCRUBBED_S = 0.25  # for a deletion to wait until it is scrubbed
_SAMPLE = 500  # encrypted photos, the newest, that have keys if these are the right ones

P = ParamSpec("P")
T = TypeVar("T")


class Database:
    """A database of SQLite or Postgres. Methods block; `run` and `run_writing` call one in a thread."""

    def __init__(
        self,
        url: str,
        now: Callable[[], float] = time.time,
        *,
        metrics: Metrics | None = None,
        stale_s: float = math.inf,
        reserve: int = 0,
        photo_keys: str = "",
    ) -> None:
        self.now = now
        self.database = opened(url)
        self._metrics = metrics or Metrics()
        self.health = Health(self._metrics, stale_s)
        try:
            self._photo_keys = PhotoKeys(photo_keys, self.database, self.health) if photo_keys else None
        except BaseException:
            self.database.dispose()
            raise
        file = SqliteFile(Path(str(self.database.url.database)), reserve) if self._is_sqlite else None
        self._plain_after: str | None = ""  # photos behind this one may be from before there were keys; none: none are
        scrubs = [part.scrub for part in (file, self._photo_keys) if part is not None]
        self._upkeep = Upkeep(self._probe, file, self.health, scrubs, self._tend_keys)
        self.start = self._upkeep.start
        self._reading = self.database.execution_options(**READING[self.database.dialect.name])
        self._looking = self._reading if self._is_sqlite else self.database.execution_options(**LOOKING)
        self._readers = ThreadPoolExecutor(THREADS, "kshot-read")
        self._glance = self.database.raw_connection() if self._is_sqlite else None
        # SQLite has one writer at a time: here they queue, where there they would sleep and look again.
        self._writers = ThreadPoolExecutor(1 if self._is_sqlite else THREADS, "kshot-write")

        with self.reading() as connection:
            for table in (SPACES, CLASSES, PHOTOS):
                if newest := connection.execute(select(func.max(table.c.id))).scalar():
                    new_id.continue_after(newest)

    def close(self) -> None:
        self._upkeep.stop()
        self._readers.shutdown()
        self._writers.shutdown()
        if self._glance is not None:
            self._glance.close()
        if self._photo_keys is not None:
            self._photo_keys.close()
        self.database.dispose()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that reads in one of the database's threads."""
        with self._metrics.stage("store"):
            return await asyncio.get_running_loop().run_in_executor(self._readers, partial(function, *args, **kwargs))

    async def soon(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for what a question waits for: if the database is away, that is said at once and not tried."""
        if not self.health.away_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SOON_S):
                    return await self.run(function, *args, **kwargs)
        raise away()

    def bridges(self, problem: Problem) -> bool:
        """Whether what was last read may be used instead of what failed so: the database is away, and not for long."""
        return (problem.code, problem.reason) == ("not_ready", "database") and self.health.bridged

    async def run_writing(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that writes. Once begun it ends, even if the caller is cancelled."""
        with self._metrics.stage("store"):
            return await asyncio.get_running_loop().run_in_executor(self._writers, partial(function, *args, **kwargs))

    def erasing(self, function: Callable[[], T]) -> T:
        """Call a function that deletes; if the disk is too full for that, once more with what was kept in reserve."""
        try:
            return function()
        except Problem as problem:
            if problem.code != "storage_full" or not self._upkeep.make_room():
                raise
        return function()

    async def scrubbed(self) -> bool | None:
        """Whether what was deleted is out of SQLite's files by now, after a short wait; none: not known.

        A photo's bytes count as gone once its key is out of such a file.
        """
        until = time.monotonic() + _SCRUBBED_S
        while self.health.unscrubbed and time.monotonic() < until:
            await asyncio.sleep(0.005)
        if self.health.unscrubbed:
            return False
        return True if self._is_sqlite or (self._photo_keys and self._photo_keys.file) else None

    @property
    def _is_sqlite(self) -> bool:
        return self.database.dialect.name == "sqlite"

    @contextmanager
    def writing(self, keys: KeyChanges | None = None) -> Iterator[Connection]:
        """A transaction that writes: all of it or nothing. `keys`: which of photos it makes and destroys."""
        changed = None
        with self.health.watched(writes=True), telling(), self.database.begin() as connection:
            yield connection
            if self._photo_keys is not None and keys is not None and (keys.new or keys.gone):
                self._photo_keys.announce(connection, changed := keys)
        if self._photo_keys is not None and changed is not None:
            with contextlib.suppress(Problem):  # then `_tend_keys` does it
                self._photo_keys.settle(changed)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database, and holds up nobody."""
        with self.health.watched(), telling(), self._reading.begin() as connection:
            yield connection

    def _probe(self) -> None:
        with self.reading() as connection:
            connection.execute(select(1))

    def check_photo_keys(self) -> None:
        """Refuse to serve encrypted photos without their keys. A few may be missing: where a backup was restored."""
        query = select(PHOTOS.c.id).where(PHOTOS.c.encrypted).order_by(PHOTOS.c.id.desc()).limit(_SAMPLE)
        with self.reading() as connection:
            photos = connection.execute(query).scalars().all()
        if photos and not (self._photo_keys and self._photo_keys.of(photos)):
            there = (
                f"the photo keys {self._photo_keys} are not theirs" if self._photo_keys else "there are no photo keys"
            )
            raise KshotError(
                f"the photos in {self.database.url.render_as_string()} are encrypted, and {there}: start the server "
                "with the --photo-keys that they were added with"
            )

    def _tend_keys(self) -> bool:
        """Settle keys of writes that were cut off, and encrypt photos from before there were keys; true: more wait."""
        if self._photo_keys is None:
            return False
        self._photo_keys.recover(self.writing)
        if self._plain_after is not None:
            with self.writing(keys := self._key_changes()) as connection:
                self._plain_after = self._photo_keys.encrypt(connection, keys, self._plain_after)
            if self._plain_after is not None:
                self._upkeep.deleted()  # what they were before is to be scrubbed
        return self._plain_after is not None

    def _key_changes(self) -> KeyChanges:
        return KeyChanges(encrypts=self._photo_keys is not None)

    def _secrets(self, encrypted: Iterable[str]) -> dict[str, bytes]:
        """The keys of these photos, those that there are."""
        photos = list(encrypted)
        return self._photo_keys.of(photos) if self._photo_keys and photos else {}

    def _decrypted(self, rows: Sequence[Row[tuple[str, bool, bytes]]], key: Key) -> dict[str, bytes]:
        """Contents as they were before they were encrypted; photos that were deleted since they were read have none."""
        found = dict(decrypted(rows, key, self._secrets(photo for photo, encrypted, _ in rows if encrypted)))
        if lost := [photo for photo, content in found.items() if content is None]:
            with self.reading() as connection:
                query = select(PHOTOS.c.id).order_by(PHOTOS.c.id)
                there = [
                    id_
                    for ids in parts(lost)
                    for id_ in connection.execute(query.where(PHOTOS.c.id.in_(ids))).scalars()
                ]
            if there:
                raise unreadable(there)
        return {photo: content for photo, content in found.items() if content is not None}

    def _publish(self) -> None:
        """What other servers remember of revisions is forgotten once this returns."""
        if not self._is_sqlite:
            time.sleep(LEASE_S)
