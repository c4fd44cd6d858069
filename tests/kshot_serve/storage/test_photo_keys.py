"""Photos encrypted with a key each: what files and backups hold of them, before and after a deletion."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import event, text

from kshot_runtime.errors import KshotError
from kshot_serve.errors import Problem
from kshot_serve.storage import photo_keys
from kshot_serve.storage.store import Store
from kshot_serve.storage.values import ORIGINAL, Key, digest

PIXELS: Key = ("pixels", "rule-1")
FEATURES: Key = ("features", "bundle-2")
SECRET = random.Random(7).randbytes(50_000)


class Place:
    """Databases for label spaces and photo keys, the stores on them, and one label space."""

    def __init__(self, folder: Path, url: str, keys: str) -> None:
        self.folder, self.url, self.keys = folder, url, keys
        self.stores: list[Store] = []

    def open(self, url: str = "", keys: str | None = None) -> Store:
        self.stores.append(Store(url or self.url, photo_keys=self.keys if keys is None else keys))
        return self.stores[-1]

    def close(self) -> None:
        while self.stores:
            self.stores.pop().close()

    def space(self, store: Store) -> str:
        with store.creating("pets", None, "ann", 10) as new:
            pass
        return new.space

    def found(self, content: bytes) -> int:
        """How many of 50 traces of it the files of the label spaces' database have, log and all."""
        if self.url.startswith("postgres"):
            with self.open(keys="").database.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("CHECKPOINT"))
            data = Path(parse_qs(urlsplit(self.url).query)["host"][0], "data")
            files = [path for part in ("base", "pg_wal") for path in (data / part).rglob("*")]
        else:
            files = list(self.folder.glob("spaces.db*"))
        return self._found(content, files)

    def found_after_vacuum(self, content: bytes) -> int:
        """The same of the table's own files on Postgres, once it was written anew."""
        with self.stores[-1].database.connect() as connection:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(text("VACUUM FULL contents"))
            connection.execute(text("CHECKPOINT"))
            query = (
                "SELECT pg_relation_filepath(part) FROM pg_class, unnest(ARRAY[oid, reltoastrelid]) AS part "
                "WHERE oid = 'contents'::regclass"
            )
            names = connection.execute(text(query)).scalars().all()
        data = Path(parse_qs(urlsplit(self.url).query)["host"][0], "data")
        return self._found(content, [data / name for name in names])

    def _found(self, content: bytes, files: list[Path]) -> int:
        read = [path.read_bytes() for path in files if path.is_file()]
        return sum(any(content[at : at + 40] in each for each in read) for at in range(0, 50_000, 1000))

    def held(self) -> dict[str, str]:
        """The photos that have keys, and the keys' states."""
        with closing(sqlite3.connect(self.keys)) as connection:
            return dict(connection.execute("SELECT photo, state FROM photo_keys").fetchall())

    def key(self, photo: str) -> bytes:
        with closing(sqlite3.connect(self.keys)) as connection:
            [key] = connection.execute("SELECT key FROM photo_keys WHERE photo = ?", (photo,)).fetchone()
            return bytes(key)


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path / 'spaces.db'}" if sqlite else request.getfixturevalue("new_database")("encrypted")
    made = Place(tmp_path, url, str(tmp_path / "keys" / "photos.db"))
    yield made
    made.close()


def add(store: Store, space: str, name: str = "cat", content: bytes = SECRET) -> tuple[str, str]:
    with store.write(space, "add_class", "ann") as change:
        class_ = change.add_class(name)
        photo = change.add_photo(class_, digest(content), {ORIGINAL: content, PIXELS: content[:3000]})
    store.keep(FEATURES, {photo: content[20_000:22_000]})
    return class_, photo


def delete(store: Store, space: str, class_: str, photo: str, what: str) -> None:
    if what == "space":
        store.delete(space)
        return
    with store.write(space, "delete_photo" if what == "photo" else "delete_class", "") as change:
        change.delete_photo(photo) if what == "photo" else change.delete_class(class_)


def eventually(true: Callable[[], bool], within_s: float = 15) -> None:
    until = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < until, "it does not come about"
        time.sleep(0.05)


@pytest.mark.parametrize("encrypted", [False, True])
def test_no_byte_that_is_known_of_a_photo_is_in_a_file_of_its_database(place: Place, encrypted: bool) -> None:
    """Without the option they are: else this test would prove nothing."""
    place.keys *= encrypted
    store = place.open()
    space = place.space(store)
    content = random.randbytes(50_000)  # Postgres' log still has what others wrote
    _, photo = add(store, space, "cat", content)
    assert place.found(content) == (0 if encrypted else 50)
    pixels, features = content[:3000], content[20_000:22_000]
    expected = {ORIGINAL: content, PIXELS: pixels, FEATURES: features}
    assert store.photo(space, photo, list(expected)) == expected
    assert store.support(space, FEATURES)[1] == store.contents([photo], FEATURES) == {photo: features}
    with place.open(keys="").reading() as without_keys:
        row = without_keys.execute(text("SELECT * FROM photos WHERE id = :id"), {"id": photo}).one()
        assert (row.sha256, row.size > 50_000, row.created <= time.time()) == (digest(content), True, True)
        for table, name in (("spaces", "pets"), ("classes", "cat")):
            assert name in without_keys.execute(text(f"SELECT name FROM {table}")).scalars().all()


def test_each_photo_has_a_key_of_its_own_for_aes_256_gcm(tmp_path: Path) -> None:
    """Decrypted here by hand: a nonce of 12 bytes comes first."""
    place = Place(tmp_path, f"sqlite:///{tmp_path / 'spaces.db'}", str(tmp_path / "photos.db"))
    store = place.open()
    space = place.space(store)
    photos = [add(store, space, name)[1] for name in ("cat", "dog")]
    keys = [place.key(photo) for photo in photos]
    assert [len(key) for key in keys] == [32, 32]
    assert keys[0] != keys[1]
    with store.reading() as connection:
        rows = connection.execute(text("SELECT photo, kind, made_by, content FROM contents")).all()
    assert len(rows) == 6
    assert len({row.content[:12] for row in rows}) == 6
    for photo, key in zip(photos, keys, strict=True):
        there = {
            row.kind: AESGCM(key).decrypt(row.content[:12], row.content[12:], "\0".join(row[:3]).encode())
            for row in rows
            if row.photo == photo
        }
        assert there == {"original": SECRET, "pixels": SECRET[:3000], "features": SECRET[20_000:22_000]}
    place.close()


@pytest.mark.parametrize("what", ["photo", "class", "space"])
def test_a_backup_from_before_a_deletion_cannot_be_read_any_more(
    place: Place, what: str, request: pytest.FixtureRequest
) -> None:
    store = place.open()
    space = place.space(store)
    class_, photo = add(store, space)
    _, other = add(store, space, "dog", b"a dog that stays" * 2000)
    place.close()
    if place.url.startswith("postgres"):
        backup = request.getfixturevalue("new_database")("backup", template="encrypted")
    else:
        backup = f"sqlite:///{place.folder / 'backup.db'}"
        with sqlite3.connect(place.folder / "spaces.db") as source, sqlite3.connect(place.folder / "backup.db") as copy:
            source.backup(copy)
    key = place.key(photo)
    with sqlite3.connect(place.keys) as source, sqlite3.connect(place.folder / "old-keys.db") as copy:
        source.backup(copy)
    assert place.open(backup).photo(space, photo, [ORIGINAL]) == {ORIGINAL: SECRET}
    store = place.open()
    delete(store, space, class_, photo, what)
    assert asyncio.run(store.scrubbed()) is True
    restored = place.open(backup)
    assert (photo, digest(SECRET)) in [(each.id, each.sha256) for each in restored.snapshot(space).photos]
    for kind in (ORIGINAL, PIXELS, FEATURES):
        with pytest.raises(Problem, match=f"cannot be decrypted, because .* destroyed .*{photo}") as refused:
            restored.photo(space, photo, [kind])
        assert refused.value.status == 409
    old_keys = str(place.folder / "old-keys.db")
    assert place.open(backup, old_keys).photo(space, photo, [ORIGINAL]) == {ORIGINAL: SECRET}
    assert not [path for path in (place.folder / "keys").iterdir() if key in path.read_bytes()]
    assert place.held() == ({} if what == "space" else {other: "kept"})
    if what != "space":
        restored.check_photo_keys()
        assert restored.photo(space, other, [ORIGINAL])[ORIGINAL].startswith(b"a dog")
        with restored.write(space, "delete_photo", "") as change:  # which the message advises
            change.delete_photo(photo)
        assert list(restored.support(space, FEATURES)[1]) == [other]


KILLED = """
import os, signal, sys
from kshot_serve.storage.photo_keys import PhotoKeys
from kshot_serve.storage.store import Store
from kshot_serve.storage.values import ORIGINAL
url, keys, space, photo, when = sys.argv[1:]
store = Store(url, photo_keys=keys)
announce = PhotoKeys.announce
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
def announce_and_die(*args): announce(*args), die()
if when == "before": PhotoKeys.announce = announce_and_die
else: PhotoKeys.settle = die
with store.write(space, "delete_photo" if photo else "add_class", "") as change:
    if photo: change.delete_photo(photo)
    else: change.add_photo(change.add_class("new"), "", {ORIGINAL: b"new"})
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("action", ["add", "delete"])
def test_a_kill_between_the_two_commits_leaves_neither_key_nor_photo_alone(
    place: Place, action: str, when: str
) -> None:
    store = place.open()
    space = place.space(store)
    _, photo = add(store, space)
    program = [sys.executable, "-c", KILLED, place.url, place.keys, space, photo if action == "delete" else "", when]
    assert subprocess.run(program).returncode == -signal.SIGKILL
    there = {each.id for each in store.snapshot(space).photos}
    assert {"new": action == "add", "gone": action == "delete"}[max(place.held().values())]  # "kept" is before both
    place.close()
    store = place.open()
    store.start()
    eventually(lambda: place.held() == dict.fromkeys(there, "kept"))
    assert (
        len(there)
        == {("add", "before"): 1, ("add", "after"): 2, ("delete", "before"): 1, ("delete", "after"): 0}[action, when]
    )
    assert store.contents(sorted(there), ORIGINAL).keys() == there


def test_what_a_killed_process_leaves_is_settled_by_a_server_that_runs(place: Place) -> None:
    store = place.open()
    space = place.space(store)
    _, photo = add(store, space)
    program = [sys.executable, "-c", KILLED, place.url, place.keys, space, photo, "after"]
    assert subprocess.run(program).returncode == -signal.SIGKILL
    assert place.held() == {photo: "gone"}
    store.start()
    eventually(lambda: place.held() == {})
    assert subprocess.run([*program[:-2], "", "after"]).returncode == -signal.SIGKILL
    [new] = [each.id for each in store.snapshot(space).photos]
    eventually(lambda: place.held() == {new: "kept"})


def test_recovering_waits_for_whoever_is_between_the_two_commits(
    new_database: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Postgres; SQLite has one writer at a time."""
    place = Place(tmp_path, new_database("encrypted"), str(tmp_path / "photos.db"))
    store, other = place.open(), place.open()
    space = place.space(store)
    announce = photo_keys.PhotoKeys.announce

    def announce_and_recover(*told: Any) -> None:
        announce(*told)
        other._tend_keys()

    monkeypatch.setattr(photo_keys.PhotoKeys, "announce", announce_and_recover)
    _, photo = add(store, space)
    assert place.held() == {photo: "kept"}
    assert store.contents([photo], ORIGINAL) == {photo: SECRET}
    place.close()


def test_two_processes_add_and_delete_while_others_recover(place: Place) -> None:
    """Whoever recovers meanwhile takes no key of a write that is under way."""
    store = place.open()
    space = place.space(store)
    program = (
        "import sys; from kshot_serve.storage.store import Store; store = Store(sys.argv[1], photo_keys=sys.argv[2])\n"
        "for i in range(10):\n"
        "    with store.write(sys.argv[3], 'add_class', '') as change:\n"
        "        photos = [change.add_photo(change.add_class(f'{sys.argv[4]}{i}{j}'), '', {('original', ''): b'x'})"
        " for j in range(2)]\n"
        "    with store.write(sys.argv[3], 'delete_photo', '') as change: change.delete_photo(photos[0])\n"
        "store.close()"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, place.url, place.keys, space, name]) for name in "ab"]
    while None in [writer.poll() for writer in writers]:
        with suppress(Problem):  # SQLite's file may be busy
            store._tend_keys()
    assert [writer.wait() for writer in writers] == [0, 0]
    photos = {photo.id for photo in store.snapshot(space).photos}
    assert len(photos) == 20
    assert place.held() == dict.fromkeys(photos, "kept")
    assert set(store.contents(sorted(photos), ORIGINAL).values()) == {b"x"}


@pytest.mark.parametrize("column", ["photo", "kind", "made_by"])
def test_rows_that_were_exchanged_are_refused(place: Place, column: str) -> None:
    store = place.open()
    space = place.space(store)
    (_, first), (_, second) = add(store, space), add(store, space, "dog", b"dog" * 9000)
    here = {"photo": first, "kind": FEATURES[0], "made_by": FEATURES[1]}
    there = here | {column: {"photo": second, "kind": "original", "made_by": "bundle-3"}[column]}
    store.keep((there["kind"], there["made_by"]), {there["photo"]: b"of the other"})
    where = " AND ".join(f"{name} = :{{}}{name}" for name in here)
    with store.writing() as connection:
        connection.execute(
            text(
                f"UPDATE contents SET content = (SELECT content FROM contents WHERE {where.format(*['other_'] * 3)}) "
                f"WHERE {where.format(*[''] * 3)}"
            ),
            here | {f"other_{name}": value for name, value in there.items()},
        )
    with pytest.raises(Problem, match=f"cannot be decrypted, .*{first}"):
        store.photo(space, first, [FEATURES])
    assert store.photo(space, second, [ORIGINAL]) == {ORIGINAL: b"dog" * 9000}


def test_a_server_without_the_keys_or_with_others_says_so(place: Place) -> None:
    store = place.open()
    store.check_photo_keys()
    space = place.space(store)
    _, photo = add(store, space)
    with pytest.raises(
        KshotError, match="are encrypted, and there are no photo keys: start the server with the --photo"
    ):
        place.open(keys="").check_photo_keys()
    others = place.folder / "others.db"
    other = place.open(keys=str(others))
    with pytest.raises(KshotError, match=f"the photo keys sqlite:///{others} are not theirs: start the server with"):
        other.check_photo_keys()
    with pytest.raises(Problem, match=f"not in this server's --photo-keys: {photo}; delete them, or start"):
        other.contents([photo], ORIGINAL)
    other.keep(("features", "bundle-3"), {photo: SECRET})  # what it cannot encrypt it does not keep
    assert store.contents([photo], ("features", "bundle-3")) == {}
    with closing(sqlite3.connect(place.keys)) as keys:
        keys.execute("UPDATE photo_keys SET key = randomblob(32)")
        keys.commit()
    with pytest.raises(Problem, match=f"not in this server's --photo-keys: {photo}"):
        store.support(space, FEATURES)


def test_a_photo_that_is_deleted_while_it_is_read_is_not_there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = place.open(), place.open()
    space = place.space(store)
    (class_, photo), (_, stays) = add(store, space), add(store, space, "dog")
    of = photo_keys.PhotoKeys.of

    def late(keys: photo_keys.PhotoKeys, photos: list[str]) -> dict[str, bytes]:
        if keys is store._photo_keys and photo in photos:
            delete(other, space, class_, photo, "photo")
        return of(keys, photos)

    monkeypatch.setattr(photo_keys.PhotoKeys, "of", late)
    snapshot, contents = store.support(space, FEATURES)
    assert ([each.id for each in snapshot.photos], list(contents)) == ([photo, stays], [stays])


def test_photos_from_before_are_encrypted_at_the_start_and_what_they_were_is_scrubbed(place: Place) -> None:
    before = place.open(keys="")
    space = place.space(before)
    photos = [add(before, space, f"class {number}")[1] for number in range(20)]
    assert place.found(SECRET) == 50
    place.close()
    store = place.open()
    _, new = add(store, space, "new")
    assert store.contents(photos, FEATURES) == dict.fromkeys(photos, SECRET[20_000:22_000])
    store.start()
    eventually(lambda: place.held() == dict.fromkeys([*photos, new], "kept"))
    if place.url.startswith("postgres"):  # which keeps old rows
        eventually(lambda: place.found_after_vacuum(SECRET) == 0)
    else:
        eventually(lambda: place.found(SECRET) == 0)
    assert store.contents(photos, ORIGINAL) == dict.fromkeys(photos, SECRET)
    with pytest.raises(KshotError, match="are encrypted, and there are no photo keys"):
        place.open(keys="").check_photo_keys()


def test_a_database_of_version_1_is_upgraded_and_encrypted(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "spaces.db")) as old:
        old.executescript(Path(__file__).with_name("version1.sql").read_text())
    place = Place(tmp_path, f"sqlite:///{tmp_path / 'spaces.db'}", str(tmp_path / "photos.db"))
    assert b"second photo" in (tmp_path / "spaces.db").read_bytes()
    store = place.open()
    store.start()
    eventually(lambda: not [path for path in tmp_path.iterdir() if b"second photo" in path.read_bytes()])
    [photo] = place.held()
    assert store.contents([photo], ORIGINAL) == {photo: b"second photo"}
    place.close()


def test_two_servers_share_keys_in_postgres(new_database: Callable[[str], str], tmp_path: Path) -> None:
    place = Place(tmp_path, new_database("encrypted"), new_database("keys"))
    store, other = place.open(), place.open()
    space = place.space(store)
    class_, photo = add(store, space)
    assert other.photo(space, photo, [ORIGINAL]) == {ORIGINAL: SECRET}
    delete(other, space, class_, photo, "photo")
    assert store._photo_keys is not None
    assert store._photo_keys.of([photo]) == {}
    assert asyncio.run(other.scrubbed()) is None  # as long as that Postgres keeps them
    place.close()


def test_while_a_key_is_in_its_file_a_deletion_is_not_scrubbed(place: Place) -> None:
    store = place.open()
    space = place.space(store)
    class_, photo = add(store, space)
    key = place.key(photo)
    with closing(sqlite3.connect(place.keys, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM photo_keys").fetchone()
        delete(store, space, class_, photo, "photo")
        assert asyncio.run(store.scrubbed()) is False
    eventually(lambda: asyncio.run(store.scrubbed()) is True)
    assert not [path for path in Path(place.keys).parent.iterdir() if key in path.read_bytes()]


def test_keys_of_many_photos_are_read_in_one_query(place: Place) -> None:
    store = place.open()
    space = place.space(store)
    with store.write(space, "add_class", "") as change:
        class_ = change.add_class("cat")
        for number in range(300):
            change.add_photo(class_, "", {FEATURES: str(number).encode()})
    assert store._photo_keys is not None
    asked: list[str] = []
    event.listen(store._photo_keys._database, "before_cursor_execute", lambda *told: asked.append(told[2]))
    assert len(store.support(space, FEATURES)[1]) == 300
    assert [each.split()[0] for each in asked if each.split()[0] != "BEGIN"] == ["SELECT"]


def test_the_label_spaces_own_database_is_refused_by_whatever_address(
    tmp_path: Path, new_database: Callable[[str], str]
) -> None:
    spaces = tmp_path / "spaces.db"
    (tmp_path / "link.db").symlink_to(spaces)
    url, reason = new_database("encrypted"), "photo keys must lie in another database than the label spaces"
    for keys in (str(spaces), f"sqlite:///{spaces}", str(tmp_path / "link.db")):
        with pytest.raises(KshotError, match=reason):
            Store(f"sqlite:///{spaces}", photo_keys=keys)
    with pytest.raises(KshotError, match=reason):
        Store(url, photo_keys=url.replace("kshot@", "kshot:password@"))
    Store(url, photo_keys=new_database("keys")).close()
    with pytest.raises(KshotError, match="photo keys lie in SQLite or in Postgres, not in mysql"):
        Store(f"sqlite:///{spaces}", photo_keys="mysql://somewhere/x")
