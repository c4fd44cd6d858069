"""The tables of the label spaces and keys, and their ids."""

from __future__ import annotations

import re
import secrets
import threading
import time
from typing import Literal

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    false,
)

METADATA = MetaData()


def _space() -> Column[str]:
    return Column("space", String(30), ForeignKey("spaces.id", ondelete="CASCADE"), primary_key=True)


SPACES = Table(
    "spaces",
    METADATA,
    Column("id", String(30), primary_key=True),
    Column("name", String(400), nullable=False, unique=True),
    Column("revision", Integer, nullable=False),
    Column("accept", Double),  # none: the server's default
    Column("created", Double, nullable=False),
    Column("changed", Double, nullable=False),
)

REVISIONS = Table(
    "revisions",
    METADATA,
    _space(),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("created", Double, nullable=False),
    Column("who", String(400), nullable=False),
    Column("action", String(20), nullable=False),
    Column("class", String(30)),  # that the action was about
    Column("photos", Integer, nullable=False),  # that it added or deleted
    Column("back_to", Integer),
    Column("accept", Double),  # in force from here on
)

CLASSES = Table(
    "classes",
    METADATA,
    _space(),
    Column("id", String(30), primary_key=True),
    Column("from_revision", Integer, primary_key=True, autoincrement=False),
    Column("to_revision", Integer),  # the first that it is not in
    Column("name", String(400)),  # none: the class was deleted
)

MEMBERS = Table(
    "members",
    METADATA,
    _space(),
    Column("photo", String(30), primary_key=True),  # which may be deleted
    Column("from_revision", Integer, primary_key=True, autoincrement=False),
    Column("to_revision", Integer),
    Column("class", String(30), nullable=False),
)

PHOTOS = Table(
    "photos",
    METADATA,
    Column("id", String(30), primary_key=True),
    Column("space", String(30), ForeignKey("spaces.id", ondelete="CASCADE"), nullable=False),
    Column("class", String(30), nullable=False),
    Column("sha256", String(64), nullable=False),  # of the original
    Column("size", BigInteger, nullable=False),  # bytes of its contents, as they came
    Column("created", Double, nullable=False),
    Column("encrypted", Boolean, nullable=False, server_default=false()),  # its contents are, by PHOTO_KEYS
    Index("photos_of_a_space", "space", "class"),
)

CONTENTS = Table(
    "contents",
    METADATA,
    Column("photo", String(30), ForeignKey("photos.id", ondelete="CASCADE"), primary_key=True),
    Column("kind", String(10), primary_key=True),
    Column("made_by", String(64), primary_key=True),
    Column("content", LargeBinary, nullable=False),
)


KEYS = Table(
    "keys",
    METADATA,
    Column("id", String(10), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("scope", String(10), nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
    Column("created", Double, nullable=False),  # seconds since 1970, as in the other tables
    Column("revoked", Double),
    Column("expires", Double),  # none: never
    Column("owner", String(200), nullable=False, server_default=""),
    Column("note", String(1000), nullable=False, server_default=""),
    Column("spaces", Text),  # ids that it is bound to, with blanks between them; none: all
)


class _Ids:
    """Ids that sort by the time they were made, and that nobody can guess."""

    _LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def __call__(self, kind: Literal["spc", "cls", "pho"]) -> str:
        with self._lock:
            self._last = max(time.time_ns() // 1000, self._last + 1)  # in this process, each later than the last
            number = self._last << 75 | secrets.randbits(75)
        letters = "".join(self._LETTERS[number >> 5 * place & 31] for place in reversed(range(26)))
        return f"{kind}_{letters}"

    def continue_after(self, id_: str) -> None:
        """Make later ids only, also where the clock has been set back since that one was made."""
        number = sum(self._LETTERS.index(letter) << 5 * place for place, letter in enumerate(reversed(id_[4:])))
        with self._lock:
            self._last = max(self._last, number >> 75)


new_id = _Ids()
"""A new id: its kind, then the time in microseconds and 75 random bits in 26 characters."""


def is_id(text: str) -> bool:
    """Whether a text that someone sent could be an id at all, and goes into a query."""
    return re.fullmatch(f"[a-z]{{3}}_[{_Ids._LETTERS}]{{26}}", text) is not None
