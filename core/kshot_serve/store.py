"""Where label spaces lie: tables and transactions, the same for SQLite in a folder and for Postgres.

A label space has revisions, numbered from 1. What classes there are, under which names, and which photos are in them
are rows with the revision that they came with and the one that they went with; so every revision can be read, and to
go back to one is to write a new one that equals it. A write is one transaction, which makes one revision; what is
acknowledged is on disk.

What is deleted is gone: a photo's row and its contents in all revisions, and a deleted class's names. Only ids stay,
so that a revision can tell what it has lost.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar

from sqlalchemy import Column, ColumnElement, Connection, Row, Table, and_, delete, func, insert, or_, select, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import IntegrityError

from kshot_serve.database import (
    CLASSES,
    CONTENTS,
    MEMBERS,
    PHOTOS,
    READING,
    REVISIONS,
    SPACES,
    THREADS,
    is_id,
    new_id,
    opened,
    telling,
)
from kshot_serve.problems import Problem
from kshot_serve.records import (
    Action,
    Key,
    Revision,
    Snapshot,
    Space,
    alive,
    content_row,
    contents_of,
    described,
    insert_missing,
    is_of,
    parts,
    photo_row,
    revision_of,
    row_of,
    snapshot_of,
)

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

_REVISION = str(select(SPACES.c.revision).where(SPACES.c.id == "").compile(dialect=sqlite.dialect()))


class Store:
    """Label spaces in a database. Methods block; `run` calls one in a thread."""

    def __init__(self, url: str, now: Callable[[], float] = time.time) -> None:
        self.now = now
        self.database = opened(url)
        self._reading = self.database.execution_options(**READING[self.database.dialect.name])
        self._readers = ThreadPoolExecutor(THREADS, "kshot-read")
        self._glance = self.database.raw_connection() if self._is_sqlite else None
        # SQLite has one writer at a time: here they queue, where there they would sleep and look again.
        self._writers = ThreadPoolExecutor(1 if self._is_sqlite else THREADS, "kshot-write")

    def close(self) -> None:
        self._readers.shutdown()
        self._writers.shutdown()
        if self._glance is not None:
            self._glance.close()
        self.database.dispose()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that reads in one of the database's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, partial(function, *args, **kwargs))

    async def run_writing(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that writes. Once begun it ends, even if the caller is cancelled."""
        return await asyncio.get_running_loop().run_in_executor(self._writers, partial(function, *args, **kwargs))

    @property
    def _is_sqlite(self) -> bool:
        return self.database.dialect.name == "sqlite"

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes: all of it or nothing."""
        with telling(), self.database.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database, and holds up nobody."""
        with telling(), self._reading.begin() as connection:
            yield connection

    # Reading -------------------------------------------------------------------------------------------------------

    def glance(self, space: str) -> int | None:
        """The number of a label space's newest revision, from SQLite in 20 µs, on the event loop's thread.

        To ask another thread would take ten times as long. None where that is not to be had, or there is no such label
        space: ask `newest`.
        """
        if self._glance is None or self._glance.driver_connection is None:
            return None
        try:
            found = self._glance.driver_connection.execute(_REVISION, (space,)).fetchall()
        except sqlite3.Error:
            return None
        return int(found[0][0]) if found else None

    def newest(self, spaces: Sequence[str]) -> dict[str, int]:
        """The numbers of the newest revisions of those label spaces that there are."""
        query = select(SPACES.c.id, SPACES.c.revision)
        with self.reading() as connection:
            return {
                space: revision
                for ids in parts(list(filter(is_id, spaces)))
                for space, revision in connection.execute(query.where(SPACES.c.id.in_(ids))).tuples()
            }

    def space(self, space: str) -> Space:
        with self.reading() as connection:
            row = row_of(connection, space)
            return described(connection, [row])[0]

    def spaces(self, limit: int, after: str = "") -> list[Space]:
        """Label spaces from the oldest to the newest, those behind the id `after`."""
        with self.reading() as connection:
            rows = connection.execute(select(SPACES).where(SPACES.c.id > after).order_by(SPACES.c.id).limit(limit))
            return described(connection, rows.all())

    def count(self) -> int:
        with self.reading() as connection:
            return connection.execute(select(func.count()).select_from(SPACES)).scalar_one()

    def taken(self, name: str) -> bool:
        """Whether a label space has this name."""
        with self.reading() as connection:
            return connection.execute(select(SPACES.c.id).where(SPACES.c.name == name)).first() is not None

    def snapshot(self, space: str) -> Snapshot:
        with self.reading() as connection:
            return snapshot_of(connection, row_of(connection, space))

    def support(self, space: str, key: Key) -> tuple[Snapshot, dict[str, bytes]]:
        """A label space as it is, and one kind of content of each photo that has it."""
        with self.reading() as connection:
            snapshot = snapshot_of(connection, row_of(connection, space))
            return snapshot, dict(contents_of(connection, [photo.id for photo in snapshot.photos], key))

    def contents(self, photos: Sequence[str], key: Key) -> dict[str, bytes]:
        """One kind of content, of those of the photos that have it."""
        with self.reading() as connection:
            return dict(contents_of(connection, photos, key))

    def photo(self, space: str, photo: str, keys: Sequence[Key]) -> dict[Key, bytes]:
        """What there is of a photo, in any revision of its label space."""
        with self.reading() as connection:
            row_of(connection, space)
            photo_row(connection, space, photo)
            return {key: content for key in keys for _, content in contents_of(connection, [photo], key)}

    def lacking(self, keys: Sequence[Key], limit: int, after: str = "") -> list[str]:
        """Photos of any label space and revision that have none of these contents, in the order of their ids."""
        has = select(CONTENTS.c.photo).where(CONTENTS.c.photo == PHOTOS.c.id, or_(*map(is_of, keys)))
        query = select(PHOTOS.c.id).where(PHOTOS.c.id > after, ~has.exists()).order_by(PHOTOS.c.id).limit(limit)
        with self.reading() as connection:
            return list(connection.execute(query).scalars())

    def largest(self) -> tuple[int, int, int]:
        """The most classes, photos of one class, and photos that a label space holds now."""
        classes = select(MEMBERS.c.space, func.count().label("photos")).where(alive(MEMBERS))
        each = classes.group_by(MEMBERS.c.space, MEMBERS.c["class"]).subquery()
        sizes = (
            func.count().label("ways"),
            func.max(each.c.photos).label("shots"),
            func.sum(each.c.photos).label("support"),
        )
        whole = select(*sizes).group_by(each.c.space).subquery()
        with self.reading() as connection:
            ways, shots, support = connection.execute(select(*map(func.max, whole.c))).one()
        return int(ways or 0), int(shots or 0), int(support or 0)

    def revisions(self, space: str, limit: int, before: int | None = None) -> list[Revision]:
        """The newest first, those before the number `before`."""
        query = select(REVISIONS).where(REVISIONS.c.space == space).order_by(REVISIONS.c.number.desc()).limit(limit)
        if before is not None:
            query = query.where(REVISIONS.c.number < before)
        with self.reading() as connection:
            row_of(connection, space)
            rows = connection.execute(query).all()
            named = connection.execute(select(CLASSES).where(CLASSES.c.space == space)).all()
        return [revision_of(row, named) for row in rows]

    # Writing -------------------------------------------------------------------------------------------------------

    @contextmanager
    def creating(
        self, name: str, accept: float | None, who: str, most: int, action: Literal["create", "import"] = "create"
    ) -> Iterator[Write]:
        """A new label space; what the block adds is in its first revision."""
        try:
            with self.writing() as connection:
                if (there := connection.execute(select(func.count()).select_from(SPACES)).scalar_one()) >= most:
                    raise Problem(
                        "conflict", f"there are {there:,} label spaces, the most this server keeps", reason="spaces"
                    )
                space, now = new_id("spc"), self.now()
                row = {"id": space, "name": name, "revision": 0, "accept": accept, "created": now, "changed": now}
                connection.execute(insert(SPACES).values(row))
                write = Write(connection, row_of(connection, space), action, now)
                yield write
                write.finish(who)
        except IntegrityError:
            raise Problem("conflict", f"there is a label space named {name!r} already", reason="name") from None

    @contextmanager
    def write(self, space: str, action: Action, who: str) -> Iterator[Write]:
        """The next revision of a label space. If the block changes nothing, or raises, there is none."""
        try:
            with self.writing() as connection:
                write = Write(connection, row_of(connection, space, lock=True), action, self.now())
                yield write
                if write.changed:
                    write.finish(who)
        except IntegrityError:  # names of classes are checked before; what is left is a label space's
            raise Problem("conflict", "another label space has that name", reason="name") from None
        if write.erased:
            self._scrub()

    def delete(self, space: str) -> None:
        """A label space with all its revisions, photos and contents."""
        with self.writing() as connection:
            row_of(connection, space, lock=True)
            connection.execute(delete(SPACES).where(SPACES.c.id == space))
        self._scrub()

    def keep(self, key: Key, contents: Mapping[str, bytes]) -> None:
        """Contents of photos, made later; of photos that are deleted meanwhile nothing is kept."""
        with self.writing() as connection:
            for ids in parts(sorted(contents)):
                alive = select(PHOTOS.c.id).where(PHOTOS.c.id.in_(ids)).with_for_update(read=True, key_share=True)
                rows = [content_row(photo, key, contents[photo]) for photo in connection.execute(alive).scalars()]
                if rows:
                    connection.execute(insert_missing(connection, rows))

    def settle(self, pixels: Key, features: Key | None) -> None:
        """Forget pixels and features that others made, of photos that have these."""
        with self.writing() as connection:
            for key in filter(None, (pixels, features)):
                there = CONTENTS.alias()
                has = and_(there.c.photo == CONTENTS.c.photo, there.c.kind == key[0], there.c.made_by == key[1])
                connection.execute(
                    delete(CONTENTS).where(
                        CONTENTS.c.kind == key[0],
                        CONTENTS.c.made_by != key[1],
                        select(there.c.photo).where(has).exists(),
                    )
                )
            if features is None:
                connection.execute(delete(CONTENTS).where(CONTENTS.c.kind == "features"))

    def _scrub(self) -> None:
        """Take what was deleted out of SQLite's log too; its pages are overwritten by `secure_delete`."""
        if not self._is_sqlite:
            return  # Postgres overwrites deleted rows when it vacuums
        connection = self.database.raw_connection()  # SQLAlchemy's would begin a transaction
        try:
            busy, *_ = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            connection.close()
        if busy:
            log.warning("deleted photos are still in the database's log: someone reads it; the next deletion clears it")


class Write:
    """One revision in the making, inside its transaction."""

    def __init__(self, connection: Connection, row: Row[Any], action: Action, now: float) -> None:
        self.connection = connection
        self.space: str = row.id
        self.number: int = row.revision + 1
        self.action = action
        self.changed = self.erased = False
        self._row = row
        self._now = now
        self._accept: float | None = row.accept
        self._about: str | None = None
        self._photos = 0
        self._back_to: int | None = None

    @property
    def revision(self) -> int:
        """The label space's newest revision: this one, if it changes anything."""
        return self.number if self.changed else self.number - 1

    def snapshot(self) -> Snapshot:
        return snapshot_of(self.connection, self._row)

    def stored_bytes(self) -> int:
        """Of all photos that the label space keeps, in any revision."""
        query = select(func.coalesce(func.sum(PHOTOS.c.size), 0)).where(PHOTOS.c.space == self.space)
        return int(self.connection.execute(query).scalar_one())

    def rename(self, name: str) -> None:
        self.connection.execute(update(SPACES).where(SPACES.c.id == self.space).values(name=name))
        self.changed = True

    def accept(self, share: float | None) -> None:
        self._accept = share
        self.changed = True

    def add_class(self, name: str) -> str:
        self._about = new_id("cls")
        self._open_class(self._about, name)
        self.changed = True
        return self._about

    def rename_class(self, class_: str, name: str) -> None:
        self._end(CLASSES, CLASSES.c.id == class_)
        self._open_class(class_, name)
        self._about = class_
        self.changed = True

    def add_photo(self, class_: str, sha256: str, contents: Mapping[Key, bytes]) -> str:
        photo = new_id("pho")
        row = {"id": photo, "space": self.space, "class": class_, "sha256": sha256, "created": self._now}
        self.connection.execute(insert(PHOTOS).values(**row, size=sum(map(len, contents.values()))))
        self.connection.execute(insert(CONTENTS), [content_row(photo, key, each) for key, each in contents.items()])
        self._open_member(photo, class_)
        self._about = class_
        self._photos += 1
        self.changed = True
        return photo

    def delete_class(self, class_: str) -> None:
        """A class of any revision, with its photos: nothing that it was called or showed is left."""
        here = and_(CLASSES.c.space == self.space, CLASSES.c.id == class_)
        named = select(CLASSES.c.id).where(here, CLASSES.c.name.is_not(None)).limit(1)
        if not is_id(class_) or self.connection.execute(named).first() is None:
            raise Problem("class_unknown", "this label space has no such class")
        self._end(CLASSES, CLASSES.c.id == class_)
        self._end(MEMBERS, MEMBERS.c["class"] == class_)
        self.connection.execute(update(CLASSES).where(here).values(name=None))
        photos = and_(PHOTOS.c.space == self.space, PHOTOS.c["class"] == class_)
        self._photos = self.connection.execute(delete(PHOTOS).where(photos)).rowcount
        self._about = class_
        self.changed = self.erased = True

    def delete_photo(self, photo: str) -> None:
        """A photo of any revision."""
        self._about = photo_row(self.connection, self.space, photo)._mapping["class"]
        self._end(MEMBERS, MEMBERS.c.photo == photo)
        self.connection.execute(delete(PHOTOS).where(PHOTOS.c.id == photo))
        self._photos = 1
        self.changed = self.erased = True

    def roll_back(self, number: int) -> tuple[str, ...]:
        """Make this revision equal to an earlier one, and tell which of its classes and photos are gone for good."""
        known = REVISIONS.c.space == self.space, REVISIONS.c.number == number
        if not 1 <= number < self.number:
            raise Problem("revision_unknown", f"this label space has revisions 1 to {self.number - 1}")
        self._accept = self.connection.execute(select(REVISIONS.c.accept).where(*known)).scalar_one()
        classes, others = self._differences(CLASSES, number, CLASSES.c.id, CLASSES.c.name)
        members, strangers = self._differences(MEMBERS, number, MEMBERS.c.photo, MEMBERS.c["class"])
        kept = set(self.connection.execute(select(PHOTOS.c.id).where(PHOTOS.c.space == self.space)).scalars())
        for class_, _ in others:
            self._end(CLASSES, CLASSES.c.id == class_)
        for photo, _ in strangers:
            self._end(MEMBERS, MEMBERS.c.photo == photo)
        for class_, name in classes:
            if name is not None:
                self._open_class(class_, name)
        for photo, class_ in members:
            if photo in kept:
                self._open_member(photo, class_)
        self._back_to = number
        self.changed = True
        deleted = [class_ for class_, name in classes if name is None]
        return (*deleted, *(photo for photo, _ in members if photo not in kept))

    def finish(self, who: str) -> None:
        """Bump the label space's number, if nobody else has, and say what this revision did."""
        bumped = self.connection.execute(
            update(SPACES)
            .where(SPACES.c.id == self.space, SPACES.c.revision == self.number - 1)
            .values(revision=self.number, accept=self._accept, changed=self._now)
        )
        if bumped.rowcount != 1:
            raise Problem("conflict", "the label space was changed by someone else just now: try again", retry_after=1)
        self.connection.execute(
            insert(REVISIONS).values(
                {
                    "space": self.space, "number": self.number, "created": self._now, "who": who, "action": self.action,
                    "class": self._about, "photos": self._photos, "back_to": self._back_to, "accept": self._accept,
                }
            )
        )  # fmt: skip

    def _open_class(self, class_: str, name: str) -> None:
        row = {"space": self.space, "id": class_, "from_revision": self.number, "name": name}
        self.connection.execute(insert(CLASSES).values(row))

    def _open_member(self, photo: str, class_: str) -> None:
        row = {"space": self.space, "photo": photo, "from_revision": self.number, "class": class_}
        self.connection.execute(insert(MEMBERS).values(row))

    def _end(self, table: Table, which: ColumnElement[bool]) -> None:
        alive = and_(table.c.space == self.space, table.c.to_revision.is_(None), which)
        self.connection.execute(update(table).where(alive).values(to_revision=self.number))

    def _differences(self, table: Table, number: int, *columns: Column[Any]) -> tuple[list[Any], list[Any]]:
        """What a revision has and the label space has not now, and the other way round."""

        def rows(number: int | None) -> set[tuple[Any, ...]]:
            query = select(*columns).where(table.c.space == self.space, alive(table, number))
            return {tuple(row) for row in self.connection.execute(query)}

        then, now = rows(number), rows(None)
        return sorted(then - now), sorted(now - then)
