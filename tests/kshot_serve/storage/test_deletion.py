"""What is deleted is gone from SQLite's files: at once, or, where someone reads, as soon as that reader has left."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from kshot_serve.settings import Settings
from kshot_serve.storage.store import Store
from kshot_serve.storage.tables import CONTENTS, PHOTOS
from kshot_serve.storage.values import ORIGINAL, Key, digest

PIXELS: Key = ("pixels", "rule-1")
NAME = "hidden class"


class Spaces:
    """A store with one label space of two classes, and what of the second can be found in the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(f"sqlite:///{folder / 'spaces.db'}")
        stays, secret = random.Random(1).randbytes(50_000), random.Random(2).randbytes(50_000)
        with self.store.creating("pets", None, "ann", 10) as new:
            pass
        self.id = new.space
        self.add("open class", stays)
        self.class_, self.photo = self.add(NAME, secret)
        self.store.keep(("features", "bundle-2"), {self.photo: secret[20_000:21_000]})
        self.stays = stays[1000:1040]
        self.traces = [secret[at : at + 40] for at in range(0, len(secret), 1000)] + [digest(secret).encode()]

    def add(self, name: str, content: bytes) -> tuple[str, str]:
        with self.store.write(self.id, "add_class", "ann") as change:
            class_ = change.add_class(name)
            return class_, change.add_photo(class_, digest(content), {ORIGINAL: content, PIXELS: content[:4]})

    def delete(self, what: str) -> None:
        if what == "space":
            self.store.delete(self.id)
            return
        with self.store.write(self.id, "delete_photo" if what == "photo" else "delete_class", "") as change:
            change.delete_photo(self.photo) if what == "photo" else change.delete_class(self.class_)

    def found(self, *more: bytes) -> list[bytes]:
        files = b"".join(path.read_bytes() for path in self.folder.iterdir())
        return [trace for trace in (*self.traces, *more) if trace in files]


@pytest.fixture
def spaces(tmp_path: Path) -> Iterator[Spaces]:
    made = Spaces(tmp_path)
    yield made
    made.store.close()


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Someone who reads the database meanwhile, as a backup does."""
    reader = sqlite3.connect(folder / "spaces.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM contents").fetchone()
    try:
        yield
    finally:
        reader.close()


@pytest.mark.parametrize("what", ["photo", "class", "space"])
def test_no_byte_of_what_was_deleted_is_left_in_the_files(spaces: Spaces, what: str) -> None:
    """M4 of the feature table: the vectors and the bytes are gone. Read from the files, log and all."""
    assert len(spaces.found(NAME.encode())) == len(spaces.traces) + 1
    spaces.delete(what)
    assert asyncio.run(spaces.store.scrubbed()) is True
    assert spaces.found(*[NAME.encode()] * (what != "photo")) == []
    assert what == "space" or spaces.found(spaces.stays) == [spaces.stays]


def test_while_someone_reads_writes_go_on_and_the_bytes_go_when_the_reader_has_left(spaces: Spaces) -> None:
    """Found in review: the deletion took 10 s, all other writes waited, and the bytes stayed until the next one."""
    with reading(spaces.folder):
        began = time.monotonic()
        spaces.delete("class")
        spaces.add("another", b"another photo")
        assert time.monotonic() - began < 2
        assert asyncio.run(spaces.store.scrubbed()) is False
        assert spaces.store.health.unscrubbed == 1
        assert spaces.found(NAME.encode()) != []
    until = time.monotonic() + 10
    while spaces.store.health.unscrubbed and time.monotonic() < until:
        time.sleep(0.05)
    assert spaces.found(NAME.encode()) == []


def test_what_an_earlier_process_could_not_scrub_goes_at_the_next_start(spaces: Spaces) -> None:
    with reading(spaces.folder):
        spaces.delete("class")
        spaces.store.close()
        assert spaces.found(NAME.encode()) != []
        spaces.store = Store(f"sqlite:///{spaces.folder / 'spaces.db'}")
        spaces.store.start()
        time.sleep(0.5)
        assert spaces.found(NAME.encode()) != []
    until = time.monotonic() + 10
    while spaces.found(NAME.encode()) and time.monotonic() < until:
        time.sleep(0.05)
    assert spaces.found(NAME.encode()) == []


def test_a_deletion_says_whether_it_is_scrubbed_and_a_gauge_until_it_is(
    features_bundle: Path,
    tmp_path: Path,
    running: Callable[[Settings], AbstractContextManager[Any]],
    photo: Callable[..., bytes],
) -> None:
    with running(Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0)) as server:
        path = f"/v1/spaces/{server.http.post('/v1/spaces', json={'name': 's'}).json()['id']}"
        files = [("photos", ("photo", photo("red", shade=shade))) for shade in range(2)]
        added = server.http.post(f"{path}/classes", data={"name": "c"}, files=files).json()
        first, second = added["photos"]
        assert server.http.delete(f"{path}/photos/{first}").json()["scrubbed"] is True
        with reading(tmp_path):
            assert server.http.delete(f"{path}/photos/{second}").json()["scrubbed"] is False
            assert "kshot_unscrubbed_deletions 1.0" in server.http.get("/metrics").text
        until = time.monotonic() + 10
        while "kshot_unscrubbed_deletions 0.0" not in server.http.get("/metrics").text and time.monotonic() < until:
            time.sleep(0.1)
        assert "kshot_unscrubbed_deletions 0.0" in server.http.get("/metrics").text
        assert server.http.delete(path).json() == {"scrubbed": True}


def test_postgres_does_not_say(postgres: str) -> None:
    store = Store(postgres)
    with store.creating("gone", None, "", 10) as new:
        photos = [new.add_photo(new.add_class(name), digest(b"a photo"), {ORIGINAL: b"a photo"}) for name in "ab"]

    def rows() -> list[int]:
        with store.reading() as connection:
            queries = [select(column).where(column.in_(photos)) for column in (PHOTOS.c.id, CONTENTS.c.photo)]
            return [len(connection.execute(query).all()) for query in queries]

    assert rows() == [2, 2]
    with store.write(new.space, "delete_photo", "") as change:
        change.delete_photo(photos[0])
    assert rows() == [1, 1]
    assert asyncio.run(store.scrubbed()) is None
    store.delete(new.space)
    assert rows() == [0, 0]
    assert asyncio.run(store.scrubbed()) is None
    store.close()
