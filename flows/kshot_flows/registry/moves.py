"""The log of a model's moves: written first, and then MLflow's stages, tags and aliases brought to what it says.

**What holds.** Every move is first an entry in a log, and only then done. The log of model `NAME` is a registered
model `NAME.moves` whose versions are the entries: MLflow numbers them 1, 2, 3, ... and its database lets no number
be given twice, on SQLite and on a server alike. So all processes on all machines see the same entries in the same
order, and reading them from the first to the last gives everyone the same answer: which version is in which stage,
and whether an entry counted. An entry that expects a version in a stage where it no longer is does not count: that
is the compare-and-set, and it needs no lock and no lease. Entries are only ever added: the log is the audit too.

MLflow's stages, the tag `stage` and the aliases follow the log, in this order and the alias last; whoever moves
goes on until they agree with the newest entry. A process killed in between leaves them behind, never the log:
`disagreements` finds that, and the next move (or `repair`) sets it right. Moves made by other means, such as a
click in MLflow's own pages, are not in the log; they are found, and undone, in the same way.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from kshot_flows import project
from kshot_flows.registry import mlflow_api
from kshot_flows.registry.stages import SINGLE, Audit, Log, Stage, StageConflictError, Unset, the
from kshot_runtime.errors import KshotError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SUFFIX = ".moves"  # NAME.moves is the log of NAME
_ENTRY = "kshot.move"  # the tag of a log entry that holds it


def read_log(door: MlflowClient, name: str) -> Log:
    """A model's log, with all that follows from it; empty if nothing was ever moved."""
    log = Log(name)
    for version in sorted(mlflow_api.versions(door, name + SUFFIX), key=lambda version: int(version.version)):
        log.add(int(version.version), mlflow_api.moment(version.creation_timestamp), json.loads(version.tags[_ENTRY]))
    return log


def record(
    door: MlflowClient,
    name: str,
    version: int,
    stage: Stage,
    *,
    why: str,
    who: str | None,
    expect: int | Unset | None,
    back: bool = False,
) -> Audit:
    """Write a move down and bring MLflow to it; a StageConflictError if `expect` is not in the stage (any more)."""
    if not why.strip():
        raise KshotError("a move is kept for ever, and so is its reason: say why")
    log = _forget_deleted(door, name, read_log(door, name))
    if not isinstance(expect, Unset) and log.holder(stage) != expect:
        raise StageConflictError(log.conflict(stage, expect))
    entry: dict[str, Any] = {"version": version, "stage": stage, "who": who or project.user(), "why": why}
    if not isinstance(expect, Unset):
        entry["expect"] = expect
    if back:
        entry["rollback"] = True
    if stage is Stage.PRODUCTION and (uri := mlflow_api.existing(door, name, version).tags.get("gate.report")):
        entry["report"] = uri
    mine = _append(door, name, entry)
    audit = next(one for one in settle(door, name).entries if one.id == mine)
    if audit.refused:
        raise StageConflictError(audit.refused)
    return audit


def _append(door: MlflowClient, name: str, entry: Mapping[str, Any]) -> str:
    """Add an entry to the log, under a number that the database gives to no one else. Returns the entry's id."""
    log, about = name + SUFFIX, f"Who moved which version of {name} where, an entry to a version. By kshot."
    mlflow_api.create_model(door, log, about, log=True)
    entry = {"id": uuid.uuid4().hex, **entry}
    sentence = f"version {entry['version']} to {entry['stage']} by {entry['who']}: {entry['why']}"[:1000]
    mlflow_api.patiently(
        lambda: door.create_model_version(
            log,
            source=f"kshot-move:/kshot-move/{name}",
            tags={_ENTRY: json.dumps(entry)},
            description=sentence,
            await_creation_for=0,
        )
    )
    return str(entry["id"])


def _forget_deleted(door: MlflowClient, name: str, log: Log) -> Log:
    """Write down that a version which held a stage is gone, so that the stage is free."""
    there = {int(version.version) for version in mlflow_api.versions(door, name)}
    gone = [v for stage in SINGLE if (v := log.holder(stage)) is not None and v not in there]
    for version in gone:
        why = "the version was deleted from the registry"
        _append(door, name, {"version": version, "stage": Stage.NONE, "who": project.user(), "why": why})
    return read_log(door, name) if gone else log


def settle(door: MlflowClient, name: str) -> Log:
    """Bring stages, tags and, last, aliases to what the log says, until no newer entry has come meanwhile."""
    from mlflow.exceptions import MlflowException

    log = read_log(door, name)
    while True:
        try:
            mlflow_api.patiently(partial(_apply, door, name, log))
        except MlflowException as error:
            raise KshotError(
                f"the move of {name} is in its log, but MLflow did not follow: {error}. When it is well again: "
                f"kshot models {name} --repair"
            ) from error
        newest = read_log(door, name)
        if len(newest.entries) == len(log.entries):
            return newest
        log = newest


def _apply(door: MlflowClient, name: str, log: Log) -> None:
    known = {int(version.version): version for version in mlflow_api.versions(door, name)}
    stages = {number: Stage(version.current_stage) for number, version in known.items()}
    wanted = log.wanted(stages)
    # A stage that holds one version is taken in one transaction, which archives whoever was there.
    for number in sorted(wanted, key=lambda number: wanted[number] not in SINGLE):
        target = wanted[number]
        others = [other for other in stages if other != number and stages[other] is target and target in SINGLE]
        if stages[number] is not target or others:
            mlflow_api.transition(door, name, number, target)
            stages.update(dict.fromkeys(others, Stage.ARCHIVED) | {number: target})
    for number, version in known.items():
        if version.tags.get("stage", Stage.NONE) != wanted[number]:
            door.set_model_version_tag(name, str(number), "stage", wanted[number])
    aliases = mlflow_api.aliases(door, name)
    for stage in SINGLE:
        alias, holder = stage.lower(), next((n for n, where in wanted.items() if where is stage), None)
        if holder is not None and aliases.get(alias) != holder:
            door.set_registered_model_alias(name, alias, str(holder))
        elif holder is None and alias in aliases:
            door.delete_registered_model_alias(name, alias)


def differences(door: MlflowClient, name: str, log: Log) -> list[str]:
    """Where MLflow is not what the log says, in a sentence each."""
    known = {int(version.version): version for version in mlflow_api.versions(door, name)}
    wanted = log.wanted({number: Stage(version.current_stage) for number, version in known.items()})
    gaps = set(range(1, max(log.numbers, default=0))) - log.numbers
    found = [f"entry {number} of the log was deleted" for number in sorted(gaps)]
    for number, version in known.items():
        if Stage(version.current_stage) is not wanted[number]:
            found.append(f"version {number} is in {version.current_stage}, and the log says {wanted[number]}")
        elif (tag := version.tags.get("stage", Stage.NONE)) != wanted[number]:
            found.append(f"version {number} is tagged {tag}, and the log says {wanted[number]}")
    aliases = mlflow_api.aliases(door, name)
    for stage in SINGLE if log.entries else ():
        holder = next((number for number, where in wanted.items() if where is stage), None)
        if aliases.get(stage.lower()) != holder:
            at = the(aliases.get(stage.lower()))
            found.append(f"the alias {stage.lower()} is at {at}, and the log says {the(holder)}")
    return found
