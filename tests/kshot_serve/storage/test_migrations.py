"""Databases of earlier versions become those of this one in place; several servers may start on one at once."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from kshot_runtime.errors import KshotError
from kshot_serve.storage.keys import Keys
from kshot_serve.storage.migrations import HEAD, TABLE, configuration
from kshot_serve.storage.store import Store
from kshot_serve.storage.tables import METADATA
from kshot_serve.storage.upkeep import SqliteFile
from kshot_serve.storage.values import ORIGINAL

VERSION_1 = Path(__file__).with_name("version1.sql").read_text()
SPACE, PHOTO = "spc_1k1frby9a5d63x8dvc7ad2fhec", "pho_1k1frbyb9sez2cep6m1jcyje65"
KEY = "kshot_xtt4de120r_ea1a253b60b0a3d15f762b177479b702c3909dbf759ec948caaa81e98e47b4ab"


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """database(sql): the URL of a new database with what these statements write."""

    def made(sql: str) -> str:
        url = f"sqlite:///{tmp_path / 'spaces.db'}"
        if request.param == "postgres":
            url, sql = request.getfixturevalue("new_database")("migrated"), _postgres(sql)
        engine = create_engine(url)
        with engine.begin() as connection:
            for statement in filter(None, (line.strip().removesuffix(";") for line in sql.splitlines())):
                if not statement.startswith("--"):
                    connection.exec_driver_sql(statement.replace("%", "%%"))
        engine.dispose()
        return url

    return made


def _postgres(sql: str) -> str:
    return sql.replace("BLOB", "BYTEA").replace("DOUBLE", "DOUBLE PRECISION").replace(",X'", ",'\\x")


def differences(store: Store) -> list[object]:
    """Between the tables of a database and those of tables.py."""
    with store.database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": TABLE, "compare_type": True})
        return list(compare_metadata(context, METADATA))


@pytest.mark.parametrize("keys", [True, False])
def test_a_database_of_version_1_is_upgraded_in_place(database: Callable[[str], str], keys: bool) -> None:
    sql = "\n".join(line for line in VERSION_1.splitlines() if keys or " keys " not in line)
    store = Store(database(sql))
    [cat] = store.snapshot(SPACE).classes
    assert (cat.name, [photo.id for photo in cat.photos]) == ("cat", [PHOTO])
    assert store.photo(SPACE, PHOTO, [ORIGINAL]) == {ORIGINAL: b"second photo"}
    assert [each.what for each in store.revisions(SPACE, 9)] == ["a photo of cat", "cat, 2 photos", ""]
    with store.write(SPACE, "add_class", "") as change:
        change.add_class("dog")
    if keys:
        found = asyncio.run(Keys(store).check(KEY))
        assert (found.name, found.scope, found.spaces, found.expires, found.owner) == (
            "shop read",
            "read",
            None,
            None,
            "",
        )
    assert differences(store) == []
    store.close()


def test_a_file_of_an_earlier_version_does_not_shrink_and_its_room_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "spaces.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript(VERSION_1)
    store = Store(f"sqlite:///{path}")
    sizes = []
    for content in (b"1" * 1_000_000, b"2" * 1_000_000):
        with store.write(SPACE, "add_class", "") as change:
            photo = change.add_photo(change.add_class(f"class {content[:1]!r}"), "0" * 64, {ORIGINAL: content})
        with store.write(SPACE, "delete_photo", "") as change:
            change.delete_photo(photo)
        file = SqliteFile(path, 0)
        file.shrink()
        assert file.scrub()
        file.close()
        sizes.append(path.stat().st_size)
    store.close()
    assert sizes[1] - 100_000 < sizes[0] > 1_000_000


def test_a_new_database_has_the_tables_that_migrations_make(database: Callable[[str], str]) -> None:
    store = Store(database(""))
    assert differences(store) == []
    with store.database.connect() as connection:
        assert ScriptDirectory.from_config(configuration(connection)).get_current_head() == HEAD
    store.close()


def test_one_of_a_newer_kshot_is_refused(database: Callable[[str], str]) -> None:
    url = database("")
    store = Store(url)
    with store.writing() as connection:
        connection.exec_driver_sql(f"UPDATE {TABLE} SET version_num = '9999'")
    store.close()
    with pytest.raises(KshotError, match="written by a newer kshot"):
        Store(url)


@pytest.mark.parametrize("sql", ["", VERSION_1])
def test_servers_that_start_together_all_do(database: Callable[[str], str], sql: str) -> None:
    """Seen in review: the keys' table was made outside the lock, and the slower of two servers ended."""
    url, together = database(sql), threading.Barrier(8)

    def start(_: int) -> Store:
        together.wait()
        return Store(url)

    with ThreadPoolExecutor(8) as many:
        stores = list(many.map(start, range(8)))
    Keys(stores[0]).new("shop", "read")
    assert [key.name for key in Keys(stores[-1]).all()][-1] == "shop"
    assert differences(stores[3]) == []
    for store in stores:
        store.close()


def test_an_open_database_that_is_up_to_date_does_not_load_alembic(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'spaces.db'}"
    Store(url).close()
    program = (
        "import sys; from kshot_serve.storage.store import Store; Store(sys.argv[1]).close(); "
        "sys.exit(any(name.startswith('alembic') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program, url]).returncode == 0
