"""API keys and their scopes; only hashes of keys are stored."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

from sqlalchemy import RowMapping, insert, select, update

from kshot_runtime.errors import KshotError
from kshot_serve.errors import Problem
from kshot_serve.storage.store import Store
from kshot_serve.storage.tables import KEYS
from kshot_serve.storage.values import when

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""Each may do what those before it may."""

OPEN = frozenset({"/healthz/live", "/healthz/ready", "/v2/health/live", "/v2/health/ready"})
"""The paths that never need a key: these, letter by letter, and no others that merely end like them."""

_KEY = re.compile(r"kshot_([0-9a-z]{10})_([0-9a-f]{64})")
_REMEMBERED_S = 5.0  # a revoked key may live on for so long
_IDS_S = 1.0  # how old the list of all ids may be
_WRONG_KEYS = 1000  # that are remembered, for as long

_MOST_SPACES = 500  # that a key may be bound to
_SPANS = {"h": 1, "d": 24, "w": 7 * 24}  # hours


@dataclass(frozen=True)
class Key:
    """What is known of a key: everything but its secret."""

    id: str
    name: str
    scope: Scope
    created: datetime
    revoked: datetime | None = None
    expires: datetime | None = None
    owner: str = ""
    note: str = ""
    spaces: frozenset[str] | None = None  # ids of the only label spaces that it sees; none: it sees all

    def may(self, scope: Scope) -> bool:
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


class Keys:
    """The keys in a database.

    A key is `kshot_ID_SECRET`, and the secret is 256 random bits. Nobody can guess those, so a plain SHA-256 keeps
    them as safe as a slow hash would, which is made for passwords that people choose, and costs a request nothing.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._known: dict[bytes, tuple[Key, float]] = {}  # valid keys, by their hash, and until when to trust that
        self._ids, self._ids_until = frozenset[str](), 0.0
        self._wrong: dict[bytes, float] = {}  # others, by their hash, and until when not to ask again

    def new(
        self, name: str, scope: Scope, *, spaces: Sequence[str] = (), expires: str = "", owner: str = "", note: str = ""
    ) -> tuple[Key, str]:
        """Make a key. Its text is given once, here, and kept nowhere.

        `spaces`: ids or names of the only label spaces that it shall see; none: all. `expires`: "90d", say; "": never.
        """
        if not 1 <= len(name) <= 200 or not name.isprintable():
            raise KshotError(f"{name!r} cannot name a key: give it 1 to 200 printable characters")
        for what, given, most in (("owner", owner, 200), ("note", note, 1000)):
            if len(given) > most or not (given + "x").isprintable():
                raise KshotError(f"a key's {what} has at most {most} printable characters")
        if len(spaces) > _MOST_SPACES:
            raise KshotError(f"a key can be bound to at most {_MOST_SPACES} label spaces")
        alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
        secret, now = secrets.token_hex(32), datetime.now(UTC)
        row: dict[str, Any] = {
            "id": "".join(secrets.choice(alphabet) for _ in range(10)), "name": name, "scope": scope,
            "hash": _hash(secret), "created": now.timestamp(), "revoked": None,
            "expires": (now + _span(expires)).timestamp() if expires else None, "owner": owner, "note": note,
            "spaces": " ".join(sorted(set(map(self._store.find, spaces)))) or None,
        }  # fmt: skip
        with self._store.writing() as connection:
            connection.execute(insert(KEYS).values(row))
        return _key(row), f"kshot_{row['id']}_{secret}"

    def all(self) -> list[Key]:
        """Every key, revoked ones too, from the oldest to the newest."""
        with self._store.reading() as connection:
            rows = connection.execute(select(KEYS).order_by(KEYS.c.created, KEYS.c.id)).mappings()
            return [_key(row) for row in rows]

    def revoke(self, key: str) -> Key:
        """Make a key worthless. It stays in the list, with the time."""
        with self._store.writing() as connection:
            row = connection.execute(select(KEYS).where(KEYS.c.id == key)).mappings().first()
            if row is None:
                raise KshotError(f"there is no key {key!r}; `kshot keys list` shows their ids")
            if row["revoked"] is None:
                connection.execute(update(KEYS).where(KEYS.c.id == key).values(revoked=time.time()))
        self._known.clear()
        return next(each for each in self.all() if each.id == key)

    async def check(self, text: str | None) -> Key:
        """The key that this text is, or a refusal."""
        if not text:
            raise Problem(
                "key_missing", "this server needs an API key: send it as `Authorization: Bearer kshot_…`, or X-API-Key"
            )
        whole = _hash(text)
        known = self._known.get(whole)
        if known is not None and self._clock() < known[1] and not _is_over(known[0].expires):
            return known[0]
        if self._clock() < self._wrong.get(whole, 0):
            raise _wrong()
        try:
            key = await self._store.soon(self._find, text)
        except Problem as problem:
            if known is None or _is_over(known[0].expires) or not self._store.bridges(problem):
                raise
            return known[0]
        if key is None:
            self._known.pop(whole, None)
            self._wrong.pop(whole, None)
            self._wrong[whole] = self._clock() + _REMEMBERED_S  # at the end: the first is the oldest
            if len(self._wrong) > _WRONG_KEYS:
                del self._wrong[next(iter(self._wrong))]
            raise _wrong()
        self._known[whole] = key, self._clock() + _REMEMBERED_S
        return key

    def remembers(self, text: str) -> bool:
        """Whether this text was a valid key not long ago, or is known to be none; others cost a question."""
        whole = _hash(text)
        return whole in self._known or self._clock() < self._wrong.get(whole, 0)

    async def id_in(self, text: str) -> str | None:
        """The id in this text, if a key has it; the database is asked for all ids, once a second at most."""
        if (parts := _KEY.fullmatch(text)) is None:
            return None
        if self._clock() >= self._ids_until:
            self._ids_until = self._clock() + _IDS_S
            self._ids = frozenset(key.id for key in await self._store.run(self.all))
        return parts[1] if parts[1] in self._ids else None

    def _find(self, text: str) -> Key | None:
        parts = _KEY.fullmatch(text)
        if parts is None:
            return None
        with self._store.reading() as connection:
            row = connection.execute(select(KEYS).where(KEYS.c.id == parts[1])).mappings().first()
        if row is None or not hmac.compare_digest(row["hash"], _hash(parts[2])) or row["revoked"] is not None:
            return None
        return None if _is_over((key := _key(row)).expires) else key


def _wrong() -> Problem:
    return Problem("key_unknown", "this API key is not valid: it is unknown, was revoked or has expired")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _span(text: str) -> timedelta:
    number = re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", text)
    if number is None:
        raise KshotError(f"a key expires after hours, days or weeks, such as 12h, 90d or 52w; not {text!r}")
    return timedelta(hours=int(number[1]) * _SPANS[number[2]])


def _is_over(expires: datetime | None) -> bool:
    return expires is not None and expires.timestamp() <= time.time()


def _key(row: RowMapping | dict[str, Any]) -> Key:
    revoked, expires = (None if row[name] is None else when(row[name]) for name in ("revoked", "expires"))
    spaces = None if row["spaces"] is None else frozenset(row["spaces"].split())
    return Key(
        row["id"], row["name"], row["scope"], when(row["created"]), revoked, expires, row["owner"], row["note"], spaces
    )
