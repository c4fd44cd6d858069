"""Moves between stages: written to a model's audit log first, and then MLflow's stages, tags and aliases follow it.

**The log.** The log of model `NAME` is a registered model `NAME.moves` whose versions are the entries: MLflow numbers
them 1, 2, 3, ... and its database never assigns a number twice, on SQLite and on servers. So all processes on all
machines see the same entries in the same order, and compute the same result from them: which version is in which stage,
and which entries count. An entry that expects a version in a stage that it has left does not count: this is a
compare-and-set without locks or leases. Entries are only appended, so the log is also the audit. (Tags and aliases
could not replace it: MLflow overwrites them unconditionally.)

**MLflow is updated** afterwards: stages, then the tag `stage`, and last the aliases, which serving reads. A move
repeats this until they match the newest entry.

**Interrupted or foreign?** Before a process adds an entry, it marks the model with the number of the newest entry; it
removes the mark once MLflow is updated. A mark that remains is that of a killed process. If MLflow differs from the
log, but matches what the log said at the marked entry or later, this is an interrupted move: `settle` completes it. Any
other difference was made in MLflow's pages or by another client: `settle` adds it to the log. Versions and aliases are
compared one by one, so both cases are distinguished even if they coincide. Only undoing an interrupted move by hand
looks like the interrupted move, which is then completed.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kshot_flows import project
from kshot_flows.registry import mlflow_api
from kshot_flows.registry.log import (
    ELSEWHERE,
    SINGLE,
    Audit,
    Log,
    Stage,
    StageConflictError,
    Unset,
    UnsettledError,
    the,
)
from kshot_flows.tracking import stores
from kshot_runtime.errors import KshotError

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from kshot_flows.registry.mlflow_api import Reader

SUFFIX = ".moves"  # NAME.moves is the log of NAME
_ENTRY = "kshot.move"  # the tag of a log entry that holds it
_MARK = "kshot.moving."  # how a mark's tag begins; its value is the number of an entry and the time in seconds
_OLD = 60.0  # seconds after which a mark is a dead process's: a move takes less than one


@dataclass(frozen=True)
class Shown:
    """MLflow's state of a model's versions at one point of its log."""

    stages: Mapping[int, Stage]
    tags: Mapping[int, str]
    aliases: Mapping[str, int]
    settled: int  # the last entry that MLflow is known to reflect
    old_marks: tuple[str, ...]
    marked: bool  # whether moves leave marks; earlier versions of kshot did not
    ours: bool  # not a model that another program keeps in the same registry


def read_log(door: Reader, name: str) -> Log:
    """A model's audit log; empty if nothing was ever moved."""
    log = Log(name)
    for version in sorted(mlflow_api.versions(door, name + SUFFIX), key=lambda version: int(version.version)):
        log.add(int(version.version), mlflow_api.moment(version.creation_timestamp), json.loads(version.tags[_ENTRY]))
    return log


def look(door: Reader, name: str) -> tuple[Log, Shown]:
    """A consistent snapshot of a model's log and MLflow's state: no entry was added while both were read."""
    log = read_log(door, name)
    while True:
        # Marks are read before stages: a mark removed by then belongs to a completed move.
        model = mlflow_api.model(door, name)
        known = {int(version.version): version for version in mlflow_api.versions(door, name)}
        newest = read_log(door, name)
        if newest.newest == log.newest:
            break
        log = newest
    marks = {tag: value.split() for tag, value in model.tags.items() if tag.startswith(_MARK)}
    settled = min((int(number) for number, _ in marks.values()), default=log.newest)
    shown = Shown(
        stages={number: Stage(version.current_stage) for number, version in known.items()},
        tags={number: version.tags.get("stage", Stage.NONE) for number, version in known.items()},
        aliases={alias: int(version) for alias, version in model.aliases.items()},
        settled=settled if mlflow_api.MARKED in model.tags else 0,
        old_marks=tuple(tag for tag, (_, when) in marks.items() if abs(time.time() - float(when)) > _OLD),
        marked=mlflow_api.MARKED in model.tags or not log.numbers,
        ours=bool(log.numbers) or any("bundle" in version.tags for version in known.values()),
    )
    return log, shown


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
    """Log a move and update MLflow; StageConflictError if the version `expect` is not (or no longer) in the stage."""
    if not why.strip():
        raise KshotError("a move is kept for ever, and so is its reason: say why")
    log, _ = settle(door, name)
    tags = mlflow_api.existing(door, name, version).tags
    if not isinstance(expect, Unset) and log.holder(stage) != expect:
        raise StageConflictError(log.conflict(stage, expect))
    entry: dict[str, Any] = {"id": uuid.uuid4().hex, "version": version, "stage": stage}
    entry |= {"who": who or project.user(), "why": why}
    if not isinstance(expect, Unset):
        entry["expect"] = expect
    if back:
        entry["rollback"] = True
    if stage is Stage.PRODUCTION and "gate.report" in tags:
        entry["report"] = tags["gate.report"]
    with _marked(door, name, log.newest):
        _append(door, name, entry)
        log = _follow(door, name)
    audit = next(one for one in log.entries if one.id == entry["id"])
    if audit.refused:
        raise StageConflictError(audit.refused)
    return audit


def settle(door: MlflowClient, name: str) -> tuple[Log, list[str]]:
    """Complete interrupted moves, and add moves that were made outside kshot to the log.

    Returns the log, which MLflow now matches, and one sentence for each correction.
    """
    log, shown = look(door, name)
    if in_order(log, shown):
        return log, []
    wrong = differences(log, shown)
    foreign = log.foreign(shown.stages, shown.aliases, shown.settled)
    with _marked(door, name, shown.settled):
        for version, stage, how in foreign:
            # Two processes that find the same move make one entry of it, and none if kshot moved something meanwhile.
            entry = {"id": f"{log.newest}:{version}:{stage}", "found_after": log.newest}
            _append(door, name, {**entry, "version": version, "stage": stage, "who": ELSEWHERE, "why": how})
        log = _follow(door, name)
    door.set_registered_model_tag(name, mlflow_api.MARKED, "true")
    for mark in shown.old_marks:
        door.delete_registered_model_tag(name, mark)
    found = [f"version {version} of {name} {stage.said} now: {how}; it was recorded" for version, stage, how in foreign]
    return log, found or [f"{name}: {sentence}; it was put right" for sentence in wrong]


def in_order(log: Log, shown: Shown) -> bool:
    """Whether nothing is to be settled: MLflow matches the log and has no mark, or the model is not kshot's."""
    return not shown.ours or (shown.marked and not shown.old_marks and not differences(log, shown))


def differences(log: Log, shown: Shown) -> list[str]:
    """Differences of MLflow's state from the log, one sentence each."""
    found = []
    for number, stage in shown.stages.items():
        if stage is not log.stage(number):
            found.append(f"version {number} {stage.said}, and by the log it {log.stage(number).said}")
        elif (tag := shown.tags[number]) != stage:
            found.append(f"version {number} is tagged {tag}, and the log says {stage}")
    for single in SINGLE:
        alias, holder = shown.aliases.get(single.lower()), log.holder(single)
        if alias != holder:
            found.append(f"the alias {single.lower()} is at {the(alias)}, and the log says {the(holder)}")
    return found


@contextmanager
def _marked(door: MlflowClient, name: str, settled: int) -> Iterator[None]:
    """Mark the model as possibly behind its log; the mark stays if the block does not complete."""
    from mlflow.exceptions import MlflowException

    mark = f"{_MARK}{uuid.uuid4().hex[:12]}"
    try:
        door.set_registered_model_tag(name, mark, f"{settled} {time.time():.0f}")
        yield
        door.delete_registered_model_tag(name, mark)
    except MlflowException as error:
        raise UnsettledError(
            f"MLflow did not take a move of {name}, or not all of it: {stores.reason(error)}. When it answers again, "
            f"the next command finishes what is in the audit: kshot history {name}"
        ) from error


def _append(door: MlflowClient, name: str, entry: Mapping[str, Any]) -> None:
    """Append an entry to the log, under a number that the database assigns uniquely."""
    log = name + SUFFIX
    about = (
        f"This is no model: it is the audit log of {name}, which kshot keeps here. Do not serve or delete it. Each "
        f"version is an entry: who moved which version of {name} to which stage, and why. See `kshot history {name}`."
    )
    sentence = (
        f"No model, but an entry of the audit log of {name}: "
        f"version {entry['version']} to {entry['stage']} by {entry['who']}: {entry['why']}"
    )
    mlflow_api.create_model(door, log, about, log=True)
    mlflow_api.patiently(
        lambda: door.create_model_version(
            log,
            source=f"kshot-move:/kshot-move/{name}",
            tags={_ENTRY: json.dumps(entry)},
            description=sentence[:1000],
            await_creation_for=0,
        )
    )


def _follow(door: MlflowClient, name: str) -> Log:
    """Update stages, tags and finally aliases from the log, until no newer entry appears."""
    log = read_log(door, name)
    while True:
        mlflow_api.patiently(partial(_apply, door, name, log))
        newest = read_log(door, name)
        if newest.newest == log.newest:
            return newest
        log = newest


def _apply(door: MlflowClient, name: str, log: Log) -> None:
    known = {int(version.version): version for version in mlflow_api.versions(door, name)}
    stages = {number: Stage(version.current_stage) for number, version in known.items()}
    # Moving into a stage that holds one version archives the previous one in the same transaction.
    for number in sorted(known, key=lambda number: log.stage(number) not in SINGLE):
        target = log.stage(number)
        others = [other for other in stages if other != number and stages[other] is target and target in SINGLE]
        if stages[number] is not target or others:
            mlflow_api.transition(door, name, number, target)
            stages.update(dict.fromkeys(others, Stage.ARCHIVED) | {number: target})
    for number, version in known.items():
        if version.tags.get("stage", Stage.NONE) != log.stage(number):
            door.set_model_version_tag(name, str(number), "stage", log.stage(number))
    aliases = mlflow_api.aliases(door, name)
    for single in SINGLE:
        alias, holder = single.lower(), log.holder(single)
        if holder in known and aliases.get(alias) != holder:
            door.set_registered_model_alias(name, alias, str(holder))
        elif holder not in known and alias in aliases:
            door.delete_registered_model_alias(name, alias)
