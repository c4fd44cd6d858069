"""Keys have an owner, a note, an end, and the label spaces that they are bound to."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Double, LargeBinary, String, Text, inspect

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    if not inspect(op.get_bind()).has_table("keys"):  # no key was ever made, nor needed
        op.create_table(
            "keys",
            Column("id", String(10), primary_key=True),
            Column("name", String(200), nullable=False),
            Column("scope", String(10), nullable=False),
            Column("hash", LargeBinary(32), nullable=False),
            Column("created", Double, nullable=False),
            Column("revoked", Double),
        )
    for column in (
        Column("expires", Double),
        Column("owner", String(200), nullable=False, server_default=""),
        Column("note", String(1000), nullable=False, server_default=""),
        Column("spaces", Text),
    ):
        op.add_column("keys", column)
