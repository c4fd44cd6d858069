"""The database as a file: whose it is, writers that are killed, and what is none."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select, text

from kshot_runtime.errors import KshotError
from kshot_serve.storage.engines import opened
from kshot_serve.storage.store import Store
from kshot_serve.storage.tables import SPACES
from kshot_serve.storage.values import ORIGINAL, digest


def test_the_database_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    Store(f"sqlite:///{tmp_path / 'new' / 'spaces.db'}").close()
    assert (tmp_path / "new" / "spaces.db").stat().st_mode & 0o077 == 0


def test_sqlite_waits_for_the_disk_before_a_write_is_acknowledged(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'spaces.db'}")
    with store.writing() as connection:
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2  # FULL: the log is synced at each commit
    store.close()


def test_who_opens_the_database_and_reads_does_not_wait_for_another_process_that_writes(tmp_path: Path) -> None:
    """Each new connection set auto_vacuum again, for which SQLite takes the lock of writers."""
    url = f"sqlite:///{tmp_path / 'spaces.db'}"
    database = opened(url)
    database.dispose()  # of the connections so far
    with closing(sqlite3.connect(tmp_path / "spaces.db", isolation_level=None)) as other:
        assert other.execute("PRAGMA auto_vacuum").fetchone() == (2,)  # incremental
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with database.connect().execution_options(reading=True) as connection:
            assert connection.execute(select(SPACES.c.id)).all() == []
        assert time.monotonic() - began < 5  # and not the ten seconds that a writer waits
    database.dispose()


WRITER = """
import sys
from kshot_serve.storage.values import ORIGINAL, digest
from kshot_serve.storage.store import Store

store = Store(sys.argv[1])
with store.creating("killed", None, "", 10) as new:
    pass
print(new.space, flush=True)
for number in range(1_000_000):
    with store.write(new.space, "add_class", "") as change:
        class_ = change.add_class(f"class {number}")
        for i in range(3):
            content = f"{number} {i} ".encode() * 2000
            change.add_photo(class_, digest(content), {ORIGINAL: content})
    print(number, flush=True)
"""


def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged_and_leaves_nothing_half(tmp_path: Path) -> None:
    chance = random.Random(0)
    for attempt in range(5):
        url = f"sqlite:///{tmp_path / f'{attempt}.db'}"
        process = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        space = process.stdout.readline().strip()
        acknowledged = [process.stdout.readline() for _ in range(chance.randrange(1, 30))]
        threading.Event().wait(chance.random() / 100)  # somewhere inside a write
        process.kill()
        acknowledged += [line for line in process.stdout if line.endswith("\n")]
        process.wait()
        process.stdout.close()
        store = Store(url)
        found = store.snapshot(space)
        written = [each.name for each in found.classes]
        assert written == [f"class {number}" for number in range(len(written))]
        assert len(written) > int(acknowledged[-1])
        assert found.revision == len(written) + 1 == len(store.revisions(space, 10_000))
        assert [len(each.photos) for each in found.classes] == [3] * len(written)
        kept = store.contents([photo.id for photo in found.photos], ORIGINAL)
        assert all(digest(kept[photo.id]) == photo.sha256 for photo in found.photos)
        store.close()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense", "no SQLAlchemy URL"),
        ("mysql://somewhere/x", "SQLite or in Postgres, not in mysql"),
        ("sqlite://", "need a file"),
        ("sqlite:////proc/nowhere/spaces.db", "no label spaces can lie"),
        ("postgresql://nobody@127.0.0.1:1/none", "cannot be used"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(KshotError, match=reason):
        Store(url)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spaces.db"
    path.write_bytes(b"not a database at all, but long enough to be taken for one" * 100)
    with pytest.raises(KshotError, match="cannot be used: file is not a database"):
        Store(f"sqlite:///{path}")
