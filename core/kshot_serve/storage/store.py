"""Where label spaces lie: tables and transactions, the same for SQLite in a folder and for Postgres.

A label space has revisions, numbered from 1. What classes there are, under which names, and which photos are in them
are rows with the revision that they came with and the one that they went with; so every revision can be read, and to
go back to one is to write a new one that equals it. A write is one transaction, which makes one revision; what is
acknowledged is on disk.

What is deleted is gone: a photo's row and its contents in all revisions, and a deleted class's names. Only ids stay,
so that a revision can tell what it has lost.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from sqlalchemy import and_, delete, func, insert, or_, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import IntegrityError

from kshot_serve.errors import Problem
from kshot_serve.storage.database import Database
from kshot_serve.storage.engines import telling
from kshot_serve.storage.photo_keys import content_row
from kshot_serve.storage.revision import Write
from kshot_serve.storage.tables import CLASSES, CONTENTS, MEMBERS, PHOTOS, REVISIONS, SPACES, is_id, new_id
from kshot_serve.storage.values import (
    ORIGINAL,
    Action,
    Key,
    Revision,
    Snapshot,
    Space,
    alive,
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

_REVISION = str(select(SPACES.c.revision).where(SPACES.c.id == "").compile(dialect=sqlite.dialect()))


class Store(Database):
    """Label spaces in a database."""

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
        with self.health.watched(), telling(), self._looking.connect() as connection:
            return {
                space: revision
                for ids in parts(list(filter(is_id, spaces)))
                for space, revision in connection.execute(query.where(SPACES.c.id.in_(ids))).tuples()
            }

    def space(self, space: str) -> Space:
        with self.reading() as connection:
            row = row_of(connection, space)
            return described(connection, [row])[0]

    def spaces(self, limit: int, after: str = "", only: Collection[str] | None = None) -> list[Space]:
        """Label spaces from the oldest to the newest, those behind the id `after`; if `only` is given, of those."""
        query = select(SPACES).where(SPACES.c.id > after).order_by(SPACES.c.id).limit(limit)
        with self.reading() as connection:
            rows = connection.execute(query if only is None else query.where(SPACES.c.id.in_(only)))
            return described(connection, rows.all())

    def count(self) -> int:
        with self.reading() as connection:
            return connection.execute(select(func.count()).select_from(SPACES)).scalar_one()

    def taken(self, name: str) -> str | None:
        """The id of the label space that has this name, if there is one."""
        with self.reading() as connection:
            return connection.execute(select(SPACES.c.id).where(SPACES.c.name == name)).scalar()

    def find(self, space: str) -> str:
        """The id of the label space that has this id or this name."""
        found = space if self.newest([space]) else self.taken(space)
        if found is None:
            raise Problem("space_unknown", f"there is no label space with the id or the name {space!r}")
        return found

    def snapshot(self, space: str) -> Snapshot:
        with self.reading() as connection:
            return snapshot_of(connection, row_of(connection, space))

    def support(self, space: str, key: Key) -> tuple[Snapshot, dict[str, bytes]]:
        """A label space as it is, and one kind of content of each photo that has it."""
        with self.reading() as connection:
            snapshot = snapshot_of(connection, row_of(connection, space))
            rows = contents_of(connection, [photo.id for photo in snapshot.photos], key)
        return snapshot, self._decrypted(rows, key)

    def contents(self, photos: Sequence[str], key: Key) -> dict[str, bytes]:
        """One kind of content, of those of the photos that have it."""
        with self.reading() as connection:
            rows = contents_of(connection, photos, key)
        return self._decrypted(rows, key)

    def photo(self, space: str, photo: str, keys: Sequence[Key]) -> dict[Key, bytes]:
        """What there is of a photo, in any revision of its label space."""
        with self.reading() as connection:
            photo_row(connection, space, photo)
            rows = {key: contents_of(connection, [photo], key) for key in keys}
        return {key: content for key in keys for content in self._decrypted(rows[key], key).values()}

    def photo_facts(self, space: str, photo: str) -> tuple[str, int, bool]:
        """sha256 of the file as it came, bytes of what is kept of it, and whether the file is; it is not read."""
        kept = select(CONTENTS.c.photo).where(CONTENTS.c.photo == photo, is_of(ORIGINAL)).exists().label("kept")
        with self.reading() as connection:
            row = photo_row(connection, space, photo, kept)
            return row.sha256, row.size, row.kept

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
            with self.writing(keys := self._key_changes()) as connection:
                if (there := connection.execute(select(func.count()).select_from(SPACES)).scalar_one()) >= most:
                    raise Problem(
                        "conflict", f"there are {there:,} label spaces, the most this server keeps", reason="spaces"
                    )
                space, now = new_id("spc"), self.now()
                row = {"id": space, "name": name, "revision": 0, "accept": accept, "created": now, "changed": now}
                connection.execute(insert(SPACES).values(row))
                write = Write(connection, row_of(connection, space), action, now, keys)
                yield write
                self._upkeep.check_room(write.added)
                write.finish(who)
        except IntegrityError:
            raise Problem("conflict", f"there is a label space named {name!r} already", reason="name") from None
        self._publish()

    @contextmanager
    def write(self, space: str, action: Action, who: str) -> Iterator[Write]:
        """The next revision of a label space. If the block changes nothing, or raises, there is none."""
        try:
            with self.writing(keys := self._key_changes()) as connection:
                write = Write(connection, row_of(connection, space, lock=True), action, self.now(), keys)
                yield write
                if write.changed:
                    self._upkeep.check_room(write.added)
                    write.finish(who)
        except IntegrityError:  # names of classes are checked before; what is left is a label space's
            raise Problem("conflict", "another label space has that name", reason="name") from None
        if write.erased:
            self._upkeep.deleted()
        if write.changed:
            self._publish()

    def delete(self, space: str) -> None:
        """A label space with all its revisions, photos and contents."""
        with self.writing(keys := self._key_changes()) as connection:
            row_of(connection, space, lock=True)
            keys.gone += connection.execute(select(PHOTOS.c.id).where(PHOTOS.c.space == space)).scalars()
            connection.execute(delete(SPACES).where(SPACES.c.id == space))
        self._upkeep.deleted()
        self._publish()

    def keep(self, key: Key, contents: Mapping[str, bytes]) -> None:
        """Contents of photos, made later; of photos that are deleted meanwhile nothing is kept."""
        with self.writing() as connection:
            for ids in parts(sorted(contents)):
                alive = select(PHOTOS.c.id, PHOTOS.c.encrypted).where(PHOTOS.c.id.in_(ids))
                photos = connection.execute(alive.with_for_update(read=True, key_share=True)).tuples().all()
                secrets = self._secrets(photo for photo, encrypted in photos if encrypted)
                rows = [
                    content_row(photo, key, contents[photo], secrets.get(photo))
                    for photo, encrypted in photos
                    if not encrypted or photo in secrets
                ]
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
