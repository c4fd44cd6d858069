"""Wrappers of MLflow's registry client: pagination, retries after conflicts, and helpful errors."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeAlias

from kshot_flows.registry import tables
from kshot_flows.registry.log import SINGLE, Stage
from kshot_flows.registry.tables import Tables
from kshot_flows.tracking import stores
from kshot_runtime.errors import KshotError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

Reader: TypeAlias = "MlflowClient | Tables"
"""What the registry is read through: MLflow's client, or the tables of a store where these are known."""

MARKED = "kshot.marks"  # the tag of models whose moves leave marks (kshot_flows.registry.moves)


def transition(door: MlflowClient, name: str, version: int, stage: Stage) -> None:
    """Set MLflow's own stage of a version; a stage that holds a single version archives the previous one."""
    with warnings.catch_warnings():
        # Deprecated since 2.9 and to be removed one day; the tag and the alias are what will remain.
        warnings.filterwarnings("ignore", category=FutureWarning)
        door.transition_model_version_stage(
            name, str(version), stage.value, archive_existing_versions=stage in SINGLE
        )  # fmt: skip


def patiently(call: Callable[[], object]) -> None:
    """Retry after concurrent writes: MLflow reads before it inserts, so the later writer fails."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    for attempt in range(10):
        try:
            call()
            return
        except MlflowException as error:
            away = isinstance(error.__cause__ or error.__context__, RequestException)  # retried by MLflow itself
            if attempt == 9 or away:
                raise
            time.sleep(random.uniform(0, 0.1 * (attempt + 1)))


def create_model(door: MlflowClient, name: str, description: str, log: bool = False) -> None:
    """Create a model unless it exists; `log` marks it as the audit log of another model."""
    from mlflow.exceptions import MlflowException

    try:
        door.create_registered_model(name, tags={"kshot.log" if log else MARKED: "true"}, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if log and door.get_registered_model(name).description != description:
            door.update_registered_model(name, description)


def reader() -> Reader:
    """The registry reader: SQLite tables if possible, else MLflow's client."""
    return Tables.of(stores.database_of(stores.uri())) or stores.client()


def models(door: Reader) -> list[str]:
    """The names of all models, except audit logs."""
    if isinstance(door, Tables):
        found: list[Any] = door.models()
    else:
        found = _every(lambda token: door.search_registered_models(page_token=token))
    return sorted(model.name for model in found if not _is_log(model.tags))


def model(door: Reader, name: str) -> Any:
    """The model of this name, or an error that says which there are."""
    found = door.model(name) if isinstance(door, Tables) else _model(door, name)
    if found is None or _is_log(found.tags):
        known = ", ".join(models(door)) or "none yet: `kshot run` makes the first"
        raise KshotError(f"no model {name!r} in the registry; there are: {known}")
    return found


def _model(door: MlflowClient, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return door.get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def existing(door: Reader, name: str, version: int) -> ModelVersion | tables.ModelVersion:
    """A version of a model, or an error that says which there are."""
    model(door, name)
    known = {int(one.version): one for one in versions(door, name)}
    if version not in known:
        has = ", ".join(map(str, sorted(known))) or "none"
        raise KshotError(f"{name} has no version {version}; it has: {has}")
    return known[version]


def aliases(door: Reader, name: str) -> dict[str, int]:
    """The version of each alias of a model."""
    return {alias: int(version) for alias, version in model(door, name).aliases.items()}


def versions(door: Reader, name: str) -> list[ModelVersion] | list[tables.ModelVersion]:
    """All versions of a model, in no order; none if there is no such model."""
    if isinstance(door, Tables):
        return door.versions(name)
    if "'" in name:
        return []
    found = _every(lambda token: door.search_model_versions(f"name='{name}'", page_token=token))
    return [version for version in found if version.name == name]


def _every(search: Callable[[str | None], Any]) -> list[Any]:
    """All pages of a search."""
    found: list[Any] = []
    token: str | None = None
    while True:
        page = search(token)
        found += page
        token = page.token
        if not token:
            return found


def _is_log(tags: Mapping[str, str]) -> bool:
    return tags.get("kshot.log") == "true"


def moment(milliseconds: int) -> datetime:
    """A time of MLflow's, which counts milliseconds."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
