"""Photos may be encrypted."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Boolean, Column, false

revision, down_revision = "0003", "0002"


def upgrade() -> None:
    op.add_column("photos", Column("encrypted", Boolean, nullable=False, server_default=false()))
