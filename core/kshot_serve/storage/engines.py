"""The databases that label spaces and photo keys may be stored in: SQLite in a folder, or Postgres."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from kshot_runtime.errors import KshotError
from kshot_serve.errors import Problem
from kshot_serve.storage.migrations import migrate

THREADS = 8  # that may ask a database at once

_WAIT_S = 10.0  # for others' writes
_AGAIN_S = 0.02
_DISK_FULL = "53100"  # of Postgres
_NO_ROOM_FOR_INDEX = 4874  # SQLITE_IOERR_SHMSIZE: of SQLite's log

log = logging.getLogger(__name__)

Holds = Literal["label spaces", "photo keys"]
"""What a database holds, as messages say it."""

READING: dict[str, dict[str, Any]] = {
    "sqlite": {"reading": True},
    "postgresql": {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
}
"""By dialect, the execution options of transactions that only read, and see one state of the database."""

_REASON: dict[Holds, str] = {"label spaces": "database", "photo keys": "photo_keys"}

LOOKING = {"isolation_level": "AUTOCOMMIT"}
"""Of single statements on Postgres, which need no transaction."""

_PATIENCE = {  # of Postgres' driver, for a network that swallows everything: seconds, and milliseconds
    "connect_timeout": 3,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


def opened(address: str, make_tables: Callable[[Connection], None] = migrate, holds: Holds = "label spaces") -> Engine:
    """A database with our tables in it. Transactions on it may write, unless they have the options READING.

    Its errors, which are logged, do not hold what was to be written: names and photos.
    """
    try:
        url = make_url(address)
        if url.drivername in ("postgresql", "postgres"):
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() not in READING:
            raise KshotError(f"{holds} lie in SQLite or in Postgres, not in {url.get_backend_name()}")
        database = _postgres(url) if url.get_backend_name() == "postgresql" else _sqlite(url, holds)
        try:
            with database.begin() as connection:
                make_tables(connection)
        except BaseException:
            database.dispose()
            raise
    except ArgumentError:
        raise KshotError(
            f"the address of the {holds}' database is no SQLAlchemy URL; such are sqlite:///spaces.db and "
            "postgresql://user:password@host/name"
        ) from None
    except (ImportError, NoSuchModuleError):
        raise KshotError("Postgres needs its driver: pip install 'kshot[postgres]'") from None
    except OSError as error:
        raise KshotError(f"no {holds} can lie at {url.database}: {error.strerror}") from None
    except DBAPIError as error:
        raise KshotError(f"the {holds}' database cannot be used: {error.orig}") from None
    return database


def _postgres(url: URL) -> Engine:
    return create_engine(url, pool_size=THREADS, pool_pre_ping=True, connect_args=_PATIENCE, hide_parameters=True)


def _sqlite(url: URL, holds: Holds) -> Engine:
    if url.database in (None, "", ":memory:"):
        raise KshotError(f"{holds} need a file, such as sqlite:///spaces.db")
    path = Path(str(url.database))
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # photos are their owner's affair
    patience = {"timeout": _WAIT_S, "check_same_thread": False}
    database = create_engine(url, pool_size=THREADS, connect_args=patience, hide_parameters=True)
    event.listen(database, "connect", _sqlite_connected)
    event.listen(database, "begin", _sqlite_begins)
    return database


def _sqlite_connected(connection: Any, record: object) -> None:
    connection.isolation_level = None  # BEGIN is said below, and not by the driver
    [(pages,)] = _patiently(connection, "PRAGMA page_count")
    if not pages:  # later it changes nothing, and yet waits for whoever writes
        _patiently(connection, "PRAGMA auto_vacuum=INCREMENTAL")
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",
    ):
        _patiently(connection, f"PRAGMA {pragma}")


def _patiently(connection: Any, statement: str) -> Any:
    """Execute what SQLite does not wait for by itself: changing the journal while others open the file."""
    until = monotonic() + _WAIT_S
    while True:
        try:
            return connection.execute(statement)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or monotonic() > until:
                raise
        sleep(_AGAIN_S)


def _sqlite_begins(connection: Connection) -> None:
    # A writer takes the lock at once: one that first reads and then writes could be refused in between.
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("reading") else "BEGIN IMMEDIATE")


@contextmanager
def telling(holds: Holds = "label spaces") -> Iterator[None]:
    """Tells of a database that is busy or away, as a Problem; what else it raises is a mistake of ours."""
    try:
        yield
    except DBAPIError as error:
        operational = isinstance(error, OperationalError)
        if _is_full(error):
            log.error("the %s' database: %s", holds, error.orig)
            raise full(holds) from None
        if operational and "locked" in str(error.orig):
            message = f"the {holds} are being written by others; try again"
            raise Problem("busy", message, retry_after=1, reason=_REASON[holds]) from None
        if operational or error.connection_invalidated:
            log.error("the %s' database: %s", holds, error.orig)
            raise away(holds) from None
        raise


def away(holds: Holds = "label spaces") -> Problem:
    message = f"the {holds}' database does not answer; try again"
    return Problem("not_ready", message, retry_after=5, reason=_REASON[holds])


def full(holds: Holds = "label spaces") -> Problem:
    message = f"the disk that {holds} lie on is full: delete some photos, or make room on it"
    return Problem("storage_full", message, reason="disk")


def _is_full(error: DBAPIError) -> bool:
    code = getattr(error.orig, "sqlite_errorcode", 0)
    return code in (sqlite3.SQLITE_FULL, _NO_ROOM_FOR_INDEX) or getattr(error.orig, "sqlstate", "") == _DISK_FULL
