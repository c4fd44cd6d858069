"""Databases of their own on the tests' Postgres."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import create_engine, text


@pytest.fixture
def new_database(postgres: str) -> Callable[..., str]:
    """new_database(name, template="template1"): the URL of a new database with that name; one that is there goes."""

    def made(name: str, template: str = "template1") -> str:
        server = create_engine(postgres.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
        server.dispose()
        return postgres.replace("postgresql:", "postgresql+psycopg:").replace("/postgres?", f"/{name}?")

    return made
