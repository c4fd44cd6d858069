"""Label spaces, classes, photos and revisions as values, and how they are read from rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, Table, and_, func, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from kshot_serve.errors import Problem
from kshot_serve.storage.tables import CLASSES, CONTENTS, MEMBERS, PHOTOS, SPACES, is_id

Kind = Literal["original", "pixels", "features"]
Key = tuple[Kind, str]
"""A kind of content, and what made it: an image rule for pixels, a bundle for features, nothing for the original."""
Action = Literal[
    "create", "import", "change", "add_class", "add_photos", "rename_class", "delete_class", "delete_photo", "rollback"
]

ORIGINAL: Key = ("original", "")

_AT_ONCE = 500  # ids in one statement; SQLite takes some thousands of parameters


@dataclass(frozen=True)
class Photo:
    """A photo of a class."""

    id: str
    class_id: str
    sha256: str
    created: datetime


@dataclass(frozen=True)
class Class:
    """A class, and its photos from the oldest to the newest."""

    id: str
    name: str
    photos: tuple[Photo, ...]


@dataclass(frozen=True)
class Space:
    """What there is to say of a label space without its classes."""

    id: str
    name: str
    revision: int
    classes: int
    photos: int
    accept: float | None  # share of known photos to let pass; none: the balance of both errors
    created: datetime
    changed: datetime
    accepted: float | None = None  # share of known photos that pass, on validation
    false_accepts: float | None = None  # and of unknown ones


@dataclass(frozen=True)
class Snapshot:
    """A label space at a revision: its classes from the oldest to the newest."""

    space: str
    name: str
    revision: int
    accept: float | None
    classes: tuple[Class, ...]

    @property
    def photos(self) -> list[Photo]:
        return [photo for each in self.classes for photo in each.photos]


@dataclass(frozen=True)
class Revision:
    """Who did what, and when."""

    number: int
    created: datetime
    who: str
    action: Action
    what: str
    to: int | None = None  # for a rollback, the revision that it went back to


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Queries -----------------------------------------------------------------------------------------------------------


def alive(table: Table, number: int | None = None) -> ColumnElement[bool]:
    """The rows of a revision; by default of the newest."""
    if number is None:
        return table.c.to_revision.is_(None)
    return and_(table.c.from_revision <= number, or_(table.c.to_revision.is_(None), table.c.to_revision > number))


def is_of(key: Key) -> ColumnElement[bool]:
    return and_(CONTENTS.c.kind == key[0], CONTENTS.c.made_by == key[1])


def row_of(connection: Connection, space: str, lock: bool = False) -> Row[Any]:
    query = select(SPACES).where(SPACES.c.id == space)
    row = connection.execute(query.with_for_update() if lock else query).first() if is_id(space) else None
    if row is None:
        raise Problem("space_unknown", "there is no such label space")
    return row


def photo_row(connection: Connection, space: str, photo: str, *more: ColumnElement[Any]) -> Row[Any]:
    """A photo's row and `more` columns, or a Problem: its label space or the photo is not there."""
    query = select(PHOTOS, *more).where(PHOTOS.c.space == space, PHOTOS.c.id == photo)
    row = connection.execute(query).first() if is_id(space) and is_id(photo) else None
    if row is None:
        row_of(connection, space)
        raise Problem("photo_unknown", "this label space has no such photo")
    return row


def snapshot_of(connection: Connection, row: Row[Any]) -> Snapshot:
    named = connection.execute(
        select(CLASSES.c.id, CLASSES.c.name).where(CLASSES.c.space == row.id, alive(CLASSES)).order_by(CLASSES.c.id)
    )
    held = connection.execute(
        select(PHOTOS.c.id, PHOTOS.c["class"], PHOTOS.c.sha256, PHOTOS.c.created)
        .join(MEMBERS, and_(MEMBERS.c.photo == PHOTOS.c.id, MEMBERS.c.space == row.id, alive(MEMBERS)))
        .order_by(PHOTOS.c.id)
    )
    photos: dict[str, list[Photo]] = {}
    for id_, class_, sha256, created in held:
        photos.setdefault(class_, []).append(Photo(id_, class_, sha256, when(created)))
    classes = tuple(Class(id_, name, tuple(photos.get(id_, ()))) for id_, name in named)
    return Snapshot(row.id, row.name, row.revision, row.accept, classes)


def described(connection: Connection, rows: Sequence[Row[Any]]) -> list[Space]:
    ids = [row.id for row in rows]

    def counted(table: Table) -> dict[str, int]:
        query = select(table.c.space, func.count()).where(table.c.space.in_(ids), alive(table)).group_by(table.c.space)
        return dict(connection.execute(query).tuples().all())

    classes, photos = counted(CLASSES), counted(MEMBERS)
    return [
        Space(
            row.id, row.name, row.revision, classes.get(row.id, 0), photos.get(row.id, 0), row.accept,
            when(row.created), when(row.changed),
        )
        for row in rows
    ]  # fmt: skip


def contents_of(connection: Connection, photos: Sequence[str], key: Key) -> list[Row[tuple[str, bool, bytes]]]:
    """Ids of photos, whether their contents are encrypted, and one kind of these."""
    query = select(PHOTOS.c.id, PHOTOS.c.encrypted, CONTENTS.c.content).join(CONTENTS).where(is_of(key))
    return [row for ids in parts(photos) for row in connection.execute(query.where(PHOTOS.c.id.in_(ids)))]


def insert_missing(connection: Connection, rows: list[dict[str, object]]) -> Any:
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    return dialect.insert(CONTENTS).values(rows).on_conflict_do_nothing()


def parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[i : i + _AT_ONCE] for i in range(0, len(ids), _AT_ONCE))


def revision_of(row: Row[Any], named: Iterable[Row[Any]]) -> Revision:
    class_ = row._mapping["class"]
    name = next((each.name for each in named if each.id == class_ and _in(each, row.number)), None) or "a deleted class"
    what = {
        "add_class": f"{name}, {_photos_in_words(row.photos)}",
        "add_photos": f"{_photos_in_words(row.photos)} to {name}",
        "rename_class": f"to {name}",
        "delete_class": f"a class, {_photos_in_words(row.photos)}",
        "delete_photo": f"a photo of {name}",
        "rollback": f"to revision {row.back_to}",
        "import": _photos_in_words(row.photos),
    }.get(row.action, "")
    return Revision(row.number, when(row.created), row.who, row.action, what, row.back_to)


def _in(interval: Row[Any], number: int) -> bool:
    return interval.from_revision <= number and (interval.to_revision is None or number < interval.to_revision)


def _photos_in_words(count: int) -> str:
    return "1 photo" if count == 1 else f"{count} photos"


def when(seconds: float) -> datetime:
    """A time of the tables: seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC)
