"""Encrypts each photo with a separate key. Keys are in another database, and deleting a photo deletes its key.

Without its key no copy of a photo can be read any more: in logs, replicas or backups of the label spaces
(crypto-shredding). Contents are encrypted with AES-256-GCM under random nonces (NIST SP 800-38D).

Two databases do not commit as one. So a key says `new` from before its photo is committed, and `gone` from before a
deletion is, until that transaction has ended; `recover` settles what a process that ended in between has left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    delete,
    func,
    insert,
    select,
    update,
)

from kshot_runtime.errors import KshotError
from kshot_serve.errors import Problem
from kshot_serve.storage.engines import READING, opened, telling
from kshot_serve.storage.health import Health
from kshot_serve.storage.tables import CONTENTS, PHOTOS
from kshot_serve.storage.upkeep import SqliteFile
from kshot_serve.storage.values import Key, parts

_NONCE = 12  # bytes, in front of what was encrypted
_LOCK = 7166  # of Postgres: shared by writers from before one commit until after the other
_AT_ONCE = 8  # photos from before there were keys that are encrypted in one transaction
_NAMED = 5  # photos that a message names

_METADATA = MetaData()
PHOTO_KEYS = Table(
    "photo_keys",
    _METADATA,
    Column("photo", String(30), primary_key=True),
    Column("key", LargeBinary(32), nullable=False),
    Column("state", String(4), nullable=False, index=True),  # new, kept or gone
)


@dataclass
class KeyChanges:
    """Keys that a transaction of the label spaces makes and destroys."""

    encrypts: bool  # whether new photos get one
    new: dict[str, bytes] = field(default_factory=dict)  # by photo
    gone: list[str] = field(default_factory=list)  # photos

    def make(self, photo: str) -> bytes:
        self.new[photo] = AESGCM.generate_key(256)
        return self.new[photo]


def content_row(photo: str, key: Key, content: bytes, secret: bytes | None) -> dict[str, object]:
    """A row of CONTENTS, encrypted if there is a key (`secret`) to do it with."""
    if secret is not None:
        nonce = os.urandom(_NONCE)
        content = nonce + AESGCM(secret).encrypt(nonce, content, _about(photo, key))
    return {"photo": photo, "kind": key[0], "made_by": key[1], "content": content}


def decrypted(rows: Iterable[Row[Any]], key: Key, secrets: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | None]]:
    """Photos and their contents, of rows of `contents_of`; none where the key is missing or is not the row's."""
    for photo, encrypted, content in rows:
        if not encrypted:
            yield photo, content
        elif (secret := secrets.get(photo)) is None:
            yield photo, None
        else:
            try:
                yield photo, AESGCM(secret).decrypt(content[:_NONCE], content[_NONCE:], _about(photo, key))
            except (InvalidTag, ValueError):  # the latter of a wrong length
                yield photo, None


def _about(photo: str, key: Key) -> bytes:
    """What is authenticated with a content, so that rows cannot take each other's place."""
    return "\0".join((photo, *key)).encode()


def unreadable(photos: Sequence[str]) -> Problem:
    named = ", ".join(photos[:_NAMED]) + (f" and {len(photos) - _NAMED} more" if len(photos) > _NAMED else "")
    message = (
        f"photos cannot be decrypted, because their keys were destroyed or are not in this server's --photo-keys: "
        f"{named}; delete them, or start the server with the --photo-keys that they were added with"
    )
    return Problem("not_supported", message, reason="photo_keys")


class PhotoKeys:
    """The keys of photos, in a database that is not the label spaces'."""

    def __init__(self, address: str, spaces: Engine, health: Health) -> None:
        """`address`: a file of SQLite, or a URL; `spaces`: the label spaces' database."""
        self._health = health

        def make_tables(connection: Connection) -> None:
            with spaces.connect() as other:
                if _identity(connection) == _identity(other):
                    raise KshotError("photo keys must lie in another database than the label spaces: give --photo-keys")
            if connection.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))  # several servers may start together
            _METADATA.create_all(connection)

        self._database = opened(address if "://" in address else f"sqlite:///{address}", make_tables, "photo keys")
        dialect = self._database.dialect.name
        self._reading = self._database.execution_options(**READING[dialect])
        self.file = SqliteFile(Path(str(self._database.url.database)), 0) if dialect == "sqlite" else None

    def __str__(self) -> str:
        return self._database.url.render_as_string(hide_password=True)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self._database.dispose()

    @contextmanager
    def _asking(self, database: Engine) -> Iterator[Connection]:
        with self._health.watched_keys(), telling("photo keys"), database.begin() as connection:
            yield connection

    def of(self, photos: Sequence[str]) -> dict[str, bytes]:
        """The keys of those of the photos that have one."""
        query = select(PHOTO_KEYS.c.photo, PHOTO_KEYS.c.key)
        with self._asking(self._reading) as connection:
            return {
                photo: key
                for ids in parts(photos)
                for photo, key in connection.execute(query.where(PHOTO_KEYS.c.photo.in_(ids))).tuples()
            }

    def announce(self, connection: Connection, changes: KeyChanges) -> None:
        """Commit new keys, and which ones are to go, before `connection`, which changes the photos, commits."""
        _lock(connection, func.pg_advisory_xact_lock_shared)
        with self._asking(self._database) as keys:
            if changes.new:
                rows = [{"photo": photo, "key": key, "state": "new"} for photo, key in changes.new.items()]
                keys.execute(insert(PHOTO_KEYS), rows)
            for ids in parts(changes.gone):
                keys.execute(update(PHOTO_KEYS).where(PHOTO_KEYS.c.photo.in_(ids)).values(state="gone"))

    def settle(self, changes: KeyChanges) -> None:
        """The photos are committed: keep new keys, destroy those that are to go."""
        self._settle(changes.new, changes.gone, "new")

    def _settle(self, kept: Collection[str], gone: Collection[str], *states: str) -> None:
        with self._asking(self._database) as keys:
            for ids in parts(list(kept)):
                those = PHOTO_KEYS.c.photo.in_(ids), PHOTO_KEYS.c.state.in_(states)
                keys.execute(update(PHOTO_KEYS).where(*those).values(state="kept"))
            for ids in parts(list(gone)):
                keys.execute(delete(PHOTO_KEYS).where(PHOTO_KEYS.c.photo.in_(ids)))

    def recover(self, writing: Callable[[], AbstractContextManager[Connection]]) -> None:
        """Settle the keys of transactions that have ended without doing so, committed or not.

        While no writer holds the lock, whatever is unsettled is of such. A key that is kept is never destroyed here,
        so the wrong database of label spaces, or an old one, does no harm.
        """
        if not self._unsettled():
            return
        with writing() as connection:
            if not _lock(connection, func.pg_try_advisory_xact_lock):
                return
            unsettled = self._unsettled()
            query = select(PHOTOS.c.id)
            there = {
                photo
                for ids in parts(unsettled)
                for photo in connection.execute(query.where(PHOTOS.c.id.in_(ids))).scalars()
            }
            self._settle(there, set(unsettled) - there, "new", "gone")

    def _unsettled(self, *states: str) -> list[str]:
        query = select(PHOTO_KEYS.c.photo).where(PHOTO_KEYS.c.state.in_(states or ("new", "gone")))
        with self._asking(self._reading) as connection:
            return list(connection.execute(query).scalars())

    def scrub(self) -> bool:
        """Whether the keys of all that was deleted are destroyed, and out of the file and its log if it is SQLite's."""
        try:
            left = self._unsettled("gone")
        except Problem:
            return False
        return not left and (self.file is None or self.file.scrub())

    def encrypt(self, connection: Connection, changes: KeyChanges, after: str) -> str | None:
        """Encrypt the first photos behind the id `after` that are not, in `connection`; the id of the last one."""
        plain = select(PHOTOS.c.id).where(PHOTOS.c.id > after, ~PHOTOS.c.encrypted).order_by(PHOTOS.c.id)
        photos = connection.execute(plain.limit(_AT_ONCE).with_for_update(skip_locked=True)).scalars().all()
        if not photos:
            return None
        secrets = self.of(photos)  # of an attempt that was not committed
        secrets |= {photo: changes.make(photo) for photo in photos if photo not in secrets}
        those = CONTENTS.c.photo.in_(photos)
        for photo, kind, made_by, content in connection.execute(select(CONTENTS).where(those)).all():
            row = content_row(photo, (kind, made_by), content, secrets[photo])
            here = CONTENTS.c.photo == photo, CONTENTS.c.kind == kind, CONTENTS.c.made_by == made_by
            connection.execute(update(CONTENTS).where(*here).values(content=row["content"]))
        connection.execute(update(PHOTOS).where(PHOTOS.c.id.in_(photos)).values(encrypted=True))
        return photos[-1]


def _identity(connection: Connection) -> object:
    """Of a database, by whatever address it was reached."""
    if connection.dialect.name == "sqlite":
        status = os.stat(str(connection.engine.url.database))
        return status.st_dev, status.st_ino
    return connection.execute(select(func.pg_postmaster_start_time(), func.current_database())).one()


def _lock(connection: Connection, lock: Callable[[int], Any]) -> bool:
    """Lock on Postgres, until the transaction ends; SQLite has one writer anyway."""
    return connection.dialect.name == "sqlite" or connection.execute(select(lock(_LOCK))).scalar_one() is not False
