"""The tables as they were before Alembic; a database that has them is stamped with this."""

from __future__ import annotations

revision, down_revision = "0001", None


def upgrade() -> None:
    pass
