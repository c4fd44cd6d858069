"""The registry's tables: read as MLflow's client reads them, and left to it where they may mean something else."""

import sqlite3
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest

from kshot_flows.registry import mlflow_api, moves
from kshot_flows.registry.tables import ModelVersion, RegisteredModel, Tables
from kshot_flows.tracking import stores


@pytest.fixture
def tables(project: Path) -> Tables:
    """Those of a store with versions in stages, under aliases, in neither, and deleted."""
    door = stores.client()
    if not door.search_registered_models("name = 'read'"):
        mlflow_api.create_model(door, "read", "")
        mlflow_api.create_model(door, "other", "")
        for number in range(4):
            door.create_model_version("read", f"s3://there/{number}", run_id=None, tags={"bundle": str(number)})
        door.create_model_version("other", "s3://there", tags={})
        moves.record(door, "read", 1, mlflow_api.Stage.STAGING, why="tried", who=None, expect=None)
        moves.record(door, "read", 2, mlflow_api.Stage.PRODUCTION, why="passed", who=None, expect=None)
        door.set_registered_model_alias("read", "canary", "1")
        door.delete_model_version("read", "3")
    found = Tables.of(stores.database_of(stores.uri()))
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["read", "read.moves", "other", "none"])
def test_the_tables_hold_what_mlflows_client_answers(name: str, tables: Tables) -> None:
    door = stores.client()

    def said(entity: object, kind: type) -> dict[str, object]:
        values = {field.name: getattr(entity, field.name) for field in fields(kind)}
        return values | {"version": int(values.get("version", 0))}  # type: ignore[call-overload]  # of either

    ours, theirs = ([said(one, ModelVersion) for one in mlflow_api.versions(via, name)] for via in (tables, door))
    assert sorted(ours, key=str) == sorted(theirs, key=str)
    assert len(ours) == {"read": 3, "read.moves": 2, "other": 1, "none": 0}[name]
    if name in ("read", "other"):
        mine, asked = (said(mlflow_api.model(via, name), RegisteredModel) for via in (tables, door))
        assert mine == asked | {"aliases": {alias: int(version) for alias, version in asked["aliases"].items()}}  # type: ignore[attr-defined]  # a dict
    assert mlflow_api.models(tables) == mlflow_api.models(door)


def test_a_move_made_in_mlflow_is_seen_without_its_client(tables: Tables) -> None:
    assert moves.in_order(*moves.look(tables, "read"))
    stores.client().set_registered_model_alias("read", "production", "4")
    log, shown = moves.look(tables, "read")
    assert moves.differences(log, shown) == ["the alias production is at version 4, and the log says version 2"]
    stores.client().set_registered_model_alias("read", "production", "2")


def test_mlflow_is_asked_where_tables_are_of_another_version_or_it_would_look_elsewhere(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = tmp_path / "newer.db"
    newer.write_bytes(tables.database.read_bytes())
    assert Tables.of(newer) is not None
    with closing(sqlite3.connect(newer)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'of tomorrow'")
    assert Tables.of(newer) is None
    (tmp_path / "empty.db").touch()
    assert Tables.of(tmp_path / "empty.db") is None
    assert Tables.of(stores.database_of("http://there")) is None
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://there")
    assert Tables.of(tables.database) is None
