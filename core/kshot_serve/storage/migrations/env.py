"""What Alembic runs its scripts in: the connection, and so the transaction, that migrate() was given."""

from __future__ import annotations

from alembic import context

from kshot_serve.storage.migrations import TABLE
from kshot_serve.storage.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, version_table=TABLE)
with context.begin_transaction():
    context.run_migrations()
