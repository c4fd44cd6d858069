"""Reads MLflow's registry directly from the tables of an SQLite store, without importing MLflow.

That import takes a second or two, most of the time of an unchanged run. Writes go through MLflow's client, and
so do reads from any other store or database schema.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REVISION = "dc11669786a5"  # of the tables of MLflow 3.17, as `alembic_version` names it
_REDIRECTS = ("MLFLOW_REGISTRY_URI", "MLFLOW_ENABLE_WORKSPACES", "MLFLOW_WORKSPACE")  # to another registry


@dataclass(frozen=True)
class ModelVersion:
    """A version of a model, with the fields of MLflow's entity that kshot reads."""

    name: str
    version: int
    run_id: str | None
    source: str | None
    current_stage: str
    creation_timestamp: int  # milliseconds
    tags: Mapping[str, str]


@dataclass(frozen=True)
class RegisteredModel:
    """A model, with the fields of MLflow's entity that kshot reads."""

    name: str
    tags: Mapping[str, str]
    aliases: Mapping[str, int]


@dataclass(frozen=True)
class Tables:
    """The registry in an SQLite file."""

    database: Path

    @classmethod
    def of(cls, database: Path | None) -> Tables | None:
        """The registry in this file; None if MLflow's client is needed."""
        if database is None or any(map(os.environ.get, _REDIRECTS)):
            return None
        tables = cls(database)
        try:
            known = tables._select("SELECT version_num FROM alembic_version") == [(REVISION,)]
            elsewhere = known and tables._select("SELECT 1 FROM registered_models WHERE workspace != 'default'")
        except sqlite3.Error:
            return None
        return tables if known and not elsewhere else None

    def models(self) -> list[RegisteredModel]:
        """All models, including audit logs."""
        found = (self.model(name) for (name,) in self._select("SELECT name FROM registered_models"))
        return [model for model in found if model]

    def model(self, name: str) -> RegisteredModel | None:
        """The model of this name, if there is one."""
        if not self._select("SELECT 1 FROM registered_models WHERE name = ?", name):
            return None
        tags = self._select("SELECT key, value FROM registered_model_tags WHERE name = ?", name)
        aliases = self._select("SELECT alias, version FROM registered_model_aliases WHERE name = ?", name)
        return RegisteredModel(name, dict(tags), dict(aliases))

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a model, in no order; none if there is no such model."""
        tags: dict[int, dict[str, str]] = {}
        columns = "version, run_id, source, current_stage, creation_time"
        kept = "name = ? AND current_stage != 'Deleted_Internal'"
        found = self._select(f"SELECT {columns} FROM model_versions WHERE {kept}", name)
        for version, key, value in self._select(
            "SELECT version, key, value FROM model_version_tags WHERE name = ?", name
        ):
            tags.setdefault(version, {})[key] = value
        return [
            ModelVersion(name, version, run, source, stage, made, tags.get(version, {}))
            for version, run, source, stage, made in found
        ]

    def _select(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(f"{self.database.as_uri()}?mode=ro", uri=True, timeout=30)) as connection:
            return connection.execute(query, values).fetchall()
