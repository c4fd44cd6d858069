"""One write to a label space: a transaction that makes one revision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Row, Table, and_, delete, func, insert, select, update

from kshot_serve.errors import Problem
from kshot_serve.storage.photo_keys import KeyChanges, content_row
from kshot_serve.storage.tables import CLASSES, CONTENTS, MEMBERS, PHOTOS, REVISIONS, SPACES, is_id, new_id
from kshot_serve.storage.values import Action, Key, Snapshot, alive, photo_row, snapshot_of


class Write:
    """One revision in the making, inside its transaction."""

    def __init__(self, connection: Connection, row: Row[Any], action: Action, now: float, keys: KeyChanges) -> None:
        self.connection = connection
        self.space: str = row.id
        self.number: int = row.revision + 1
        self.action = action
        self.changed = self.erased = False
        self.added = 0  # bytes of photos
        self._keys = keys
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
        size = sum(map(len, contents.values()))
        secret = self._keys.make(photo) if self._keys.encrypts else None
        self.connection.execute(insert(PHOTOS).values(**row, size=size, encrypted=secret is not None))
        rows = [content_row(photo, key, each, secret) for key, each in contents.items()]
        self.connection.execute(insert(CONTENTS), rows)
        self._open_member(photo, class_)
        self._about = class_
        self._photos += 1
        self.added += size
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
        self._keys.gone += self.connection.execute(select(PHOTOS.c.id).where(photos)).scalars()
        self._photos = self.connection.execute(delete(PHOTOS).where(photos)).rowcount
        self._about = class_
        self.changed = self.erased = True

    def delete_photo(self, photo: str) -> None:
        """A photo of any revision."""
        self._about = photo_row(self.connection, self.space, photo)._mapping["class"]
        self._end(MEMBERS, MEMBERS.c.photo == photo)
        self.connection.execute(delete(PHOTOS).where(PHOTOS.c.id == photo))
        self._keys.gone.append(photo)
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
