"""Brings a database's tables to those of tables.py: Alembic's scripts, run when a database is opened.

To change tables.py, write a script in versions/ and raise HEAD; test_migrations.py compares what both make.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, column, inspect, select, table, text

from kshot_runtime.errors import KshotError
from kshot_serve.storage.tables import METADATA

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0003"  # the newest of versions/
TABLE = "kshot_schema"  # where Alembic keeps its number; a kshot from before it refuses such a table

_LOCK = 7165  # of Postgres, for those that start together; SQLite has one writer anyway


def migrate(connection: Connection) -> None:
    """Make or change the tables, inside the transaction of `connection`, which writes."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
    inspector = inspect(connection)
    number = None
    if inspector.has_table(TABLE):
        if "version" in {each["name"] for each in inspector.get_columns(TABLE)}:  # from before Alembic
            connection.execute(text(f"DROP TABLE {TABLE}"))
            _alembic(connection, "stamp", number := "0001")
        else:
            number = connection.execute(select(column("version_num")).select_from(table(TABLE))).scalar()
    if number == HEAD:
        return  # without Alembic, which takes a third of a second to import
    if number is None:
        METADATA.create_all(connection)
        _alembic(connection, "stamp", HEAD)
    elif number > HEAD:
        raise KshotError(
            f"the label spaces were written by a newer kshot: use that one (schema {number}, and this one is at {HEAD})"
        )
    else:
        _alembic(connection, "upgrade", HEAD)


def configuration(connection: Connection) -> Config:
    from alembic.config import Config

    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    made.attributes["connection"] = connection
    return made


def _alembic(connection: Connection, command: str, number: str) -> None:
    from alembic import command as commands

    getattr(commands, command)(configuration(connection), number)
