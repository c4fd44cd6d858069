"""The registry: versions of a model with their bundles, the stage that each is in, and what led to it.

Who moved a version where, when and why is in a log (`kshot_flows.moves`), which decides; MLflow's stages, tags and
aliases follow it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kshot_flows.registry import mlflow_api, moves
from kshot_flows.registry.gate import GateReport
from kshot_flows.registry.stages import (
    ANY,
    SINGLE,
    Audit,
    GateClosedError,
    Stage,
    StageConflictError,
    Unset,
    local_time,
    the,
)
from kshot_flows.tracking import stores
from kshot_runtime.errors import KshotError

__all__ = [
    "ANY", "Audit", "GateClosedError", "Stage", "StageConflictError", "Trace", "Version", "accuracy", "champion",
    "disagreements", "fetch_bundle", "gate_report", "history", "models", "move", "promote", "record_gate", "register",
    "repair", "rollback", "trace", "versions",
]  # fmt: skip

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FILES = ("adapt.onnx", "classify.onnx", "bundle.json")  # of every bundle; some have embed.onnx besides


@dataclass(frozen=True)
class Version:
    """One version of a model, with what MLflow says of it now."""

    name: str
    version: int
    stage: Stage
    aliases: tuple[str, ...]
    when: datetime
    run: str | None
    tags: Mapping[str, str]

    def number(self, tag: str) -> float | None:
        """A tag's value as a number, where it is one."""
        try:
            return float(self.tags[tag])
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True)
class Trace:
    """Everything that led to a version, and what became of it."""

    name: str
    version: int
    facts: Mapping[str, str]
    history: Sequence[Audit]


def check_name(name: str) -> None:
    """Refuse a name that no model can have."""
    if not re.fullmatch(r"[\w-][\w.-]*", name) or name.endswith(moves.SUFFIX):
        raise KshotError(
            f"{name!r} cannot name a model: letters, digits, '.', '-' and '_' can, but {moves.SUFFIX!r} at its end"
        )


def register(name: str, run_id: str, bundle: Path, *, tags: Mapping[str, str] | None = None) -> int:
    """Keep a bundle with its run and make it a version of the model `name`; the same bundle again is the same version.

    The version's source is the bundle's folder, so `models:/NAME/VERSION` downloads `adapt.onnx`, `classify.onnx`
    and `bundle.json`. Its tags carry their sha256, the data hash and git commit of the run, and what the caller adds
    (`accuracy` and `margin`, as shares of 1, are shown by `kshot models`).
    """
    check_name(name)
    missing = [file for file in _FILES if not (bundle / file).is_file()]
    if missing:
        raise KshotError(f"{bundle} is not a bundle: it lacks {', '.join(missing)}. `kshot run` makes one.")
    hashes = _hashes(bundle)
    identity = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]
    door = stores.client()
    mlflow_api.create_model(
        door, name, f"Few-shot learners made by kshot. Their moves between stages: {name}{moves.SUFFIX}"
    )
    for known in mlflow_api.versions(door, name):
        if known.run_id == run_id and known.tags.get("bundle") == identity:
            return int(known.version)
    run = door.get_run(run_id)
    folder = f"bundle-{identity}"  # one run may export twice; the first version keeps its files
    door.log_artifacts(run_id, str(bundle), folder)
    made = door.create_model_version(
        name,
        source=f"{run.info.artifact_uri}/{folder}",
        run_id=run_id,
        await_creation_for=0,  # it is ready when made; waiting only writes log lines
        tags={
            "stage": Stage.NONE,
            "bundle": identity,
            **{f"sha256.{file}": sha256 for file, sha256 in hashes.items()},
            **_from_run(run.data.tags),
            **(tags or {}),
        },
    )
    return int(made.version)


def move(
    name: str,
    version: int,
    stage: Stage | str,
    *,
    why: str,
    who: str | None = None,
    expect: int | Unset | None = ANY,
) -> Audit:
    """Put a version into a stage; in staging and production the version that was there goes to the archive.

    `expect` is the version believed to be in that stage now (None: nobody); if it is another, nothing moves and a
    StageConflictError says who changed it.
    """
    stage = Stage.of(stage)
    if stage not in SINGLE and expect is not ANY:
        raise KshotError(f"{stage} holds any number of versions, so none can be expected there")
    door = stores.client()
    mlflow_api.existing(door, name, version)
    return moves.record(door, name, version, stage, why=why, who=who, expect=expect)


def promote(
    name: str, version: int, stage: Stage | str, *, why: str | None = None, who: str | None = None, force: bool = False
) -> Audit:
    """Move a version, into production only through its gate: a report that passed, against the champion of today.

    `force` passes by the gate, and must say why.
    """
    stage = Stage.of(stage)
    if force and not why:
        raise KshotError("passing by the gate needs a reason: add --why")
    if stage is not Stage.PRODUCTION or force:
        return move(name, version, stage, why=f"{why} (forced)" if force else why or "by hand", who=who)
    by_force = f"to pass by the gate: kshot promote {name} {version} production --force --why REASON"
    report = gate_report(name, version)
    if report is None:
        raise GateClosedError(f"version {version} of {name} was never judged by the gate; {by_force}")
    if not report.passed:
        raise GateClosedError(
            f"version {version} of {name} did not pass its gate: {'; '.join(report.failures)}. See kshot trace "
            f"{name} {version}; {by_force}"
        )
    try:
        return move(name, version, stage, why=why or "passed the gate", who=who, expect=report.champion)
    except StageConflictError as error:
        verdict = f"The gate's verdict was on {the(report.champion)}; judge again"
        raise StageConflictError(f"{error} {verdict}, or, {by_force}") from None


def rollback(name: str, *, why: str, who: str | None = None) -> Audit:
    """Give production back to the version that served before the last; that one goes to the archive.

    Again and again, this walks back through all that ever served.
    """
    door = stores.client()
    mlflow_api.model(door, name)
    there = {int(version.version) for version in mlflow_api.versions(door, name)}
    log = moves.read_log(door, name)
    last = log.served[-1:]  # not always there still: whoever withdrew it does not want it back
    before = [version for version in log.served if version in there and version not in last]
    if not before:
        raise KshotError(
            f"no version of {name} served before {the(last[0]) if last else 'any other'}, so there is none to go back "
            f"to; see kshot history {name}"
        )
    champion = log.holder(Stage.PRODUCTION)
    return moves.record(door, name, before[-1], Stage.PRODUCTION, why=why, who=who, expect=champion, back=True)


def champion(name: str) -> int | None:
    """The version in production; None where there is none, or no such model yet."""
    door = stores.client()
    version = moves.read_log(door, name).holder(Stage.PRODUCTION)
    there = version is not None and any(int(known.version) == version for known in mlflow_api.versions(door, name))
    return version if there else None


def models() -> list[str]:
    """The names of all models, without the logs."""
    return mlflow_api.models(stores.client())


def versions(name: str) -> list[Version]:
    """All versions of a model, the newest first."""
    door = stores.client()
    aliases = mlflow_api.aliases(door, name)
    found = [
        Version(
            name=name,
            version=int(version.version),
            stage=Stage(version.current_stage),
            aliases=tuple(sorted(alias for alias, holder in aliases.items() if holder == int(version.version))),
            when=mlflow_api.moment(version.creation_timestamp),
            run=version.run_id,
            tags=version.tags,
        )
        for version in mlflow_api.versions(door, name)
    ]
    return sorted(found, key=lambda version: -version.version)


def history(name: str, *, refused: bool = False) -> list[Audit]:
    """All moves of a model's versions, the oldest first; with `refused`, the attempts that came too late as well."""
    door = stores.client()
    mlflow_api.model(door, name)
    return [entry for entry in moves.read_log(door, name).entries if refused or not entry.refused]


def disagreements(name: str) -> list[str]:
    """Where MLflow's stages, tags or aliases are not what the log says, in a sentence each."""
    door = stores.client()
    return moves.differences(door, name, moves.read_log(door, name))


def repair(name: str) -> None:
    """Make MLflow's stages, tags and aliases what the log says."""
    door = stores.client()
    mlflow_api.model(door, name)
    moves.settle(door, name)


def record_gate(name: str, version: int, report: Mapping[str, Any]) -> str:
    """Keep a gate report with the version's run, and its verdict on the version. Returns the report's URI."""
    door = stores.client()
    known = mlflow_api.existing(door, name, version)
    judged = GateReport.from_dict(report)
    place = f"gate/{name}-{version}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"  # never overwritten
    door.log_text(known.run_id, json.dumps(judged.to_dict(), indent=2), f"{place}.json")
    door.log_text(known.run_id, judged.to_markdown(), f"{place}.md")
    uri = f"runs:/{known.run_id}/{place}.json"
    # The verdict is read through the report, so that the two cannot disagree; `gate` is for people.
    door.set_model_version_tag(name, str(version), "gate.report", uri)
    door.set_model_version_tag(name, str(version), "gate", "passed" if judged.passed else "failed")
    door.set_model_version_tag(name, str(version), "gate.warnings", "; ".join(judged.warnings))
    return uri


def gate_report(name: str, version: int) -> GateReport | None:
    """The newest gate report of a version."""
    door = stores.client()
    uri = mlflow_api.existing(door, name, version).tags.get("gate.report")
    return None if uri is None else GateReport.from_dict(json.loads(_download(uri)))


def trace(name: str, version: int) -> Trace:
    """From a version back to its data, code, recipe and runs, and forward through its stages."""
    door = stores.client()
    known = mlflow_api.existing(door, name, version)
    tags = known.tags
    facts = {
        "stage": str(known.current_stage),
        "aliases": ", ".join(
            sorted(a for a, holder in mlflow_api.aliases(door, name).items() if holder == int(version))
        ),
        "registered": local_time(mlflow_api.moment(known.creation_timestamp)),
        "accuracy": accuracy(tags),
        "data (DVC)": tags.get("data", ""),
        "data (sha256)": tags.get("data.version", ""),
        "other data (sha256)": tags.get("data.others", ""),
        "git commit": tags.get("commit", "") + (" + changes (git.diff)" if tags.get("dirty") == "true" else ""),
        "MLflow run": known.run_id or "",
        "Prefect run": tags.get("prefect.flow_run", ""),
        "recipe": tags.get("recipe", "") + (f" (runs:/{known.run_id}/recipe.json)" if known.run_id else ""),
        "bundle": known.source or "",
        **{key: value for key, value in sorted(tags.items()) if key.startswith("sha256.")},
        "gate": " ".join(filter(None, [tags.get("gate"), tags.get("gate.report")])),
        "mind": tags.get("gate.warnings", ""),
    }
    about = [entry for entry in moves.read_log(door, name).entries if version in (entry.version, entry.displaced)]
    return Trace(name, version, {key: value for key, value in facts.items() if value}, about)


def fetch_learner(name: str, version: int | str, folder: Path) -> Path:
    """Download the `learner.pt` that a version, a number or an alias such as 'production', was exported from."""
    from mlflow.artifacts import download_artifacts

    door = stores.client()
    number = _number(door, name, version)
    file = folder / f"{name}-{number}" / "learner.pt"
    if not file.exists():
        run = mlflow_api.existing(door, name, number).run_id
        file.parent.mkdir(parents=True, exist_ok=True)
        download_artifacts(
            run_id=run, artifact_path=file.name, dst_path=str(file.parent), tracking_uri=door.tracking_uri
        )
    return file


def fetch_bundle(name: str, version: int | str, folder: Path) -> Path:
    """Download the bundle of a version, a number or an alias such as 'production', and check every hash.

    `folder` appears only when complete. If it is there and holds this very bundle, nothing is done.
    """
    from mlflow.artifacts import download_artifacts

    door = stores.client()
    number = _number(door, name, version)
    known = mlflow_api.existing(door, name, number)
    wanted = {key.removeprefix("sha256."): value for key, value in known.tags.items() if key.startswith("sha256.")}
    if folder.exists() and any(folder.iterdir()):
        if _hashes(folder) == wanted:
            return folder
        raise KshotError(f"{folder} holds something else than version {number} of {name}; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        got = Path(download_artifacts(known.source, dst_path=scratch, tracking_uri=door.tracking_uri))
        hashes = _hashes(got)
        bad = sorted(file for file in hashes.keys() | wanted.keys() if hashes.get(file) != wanted.get(file))
        if bad:
            raise KshotError(
                f"version {number} of {name} is not what was registered: {', '.join(bad)} changed in {known.source}. "
                "Do not use it; restore the files, or register the bundle anew."
            )
        if folder.exists():
            folder.rmdir()
        shutil.move(got, folder)
    return folder


def accuracy(tags: Mapping[str, str]) -> str:
    """A version's accuracy with its margin, as people write it."""
    if "accuracy" not in tags:
        return ""
    margin = f" ± {100 * float(tags['margin']):.2f}" if "margin" in tags else ""
    return f"{100 * float(tags['accuracy']):.2f}{margin} %"


def _number(door: MlflowClient, name: str, version: int | str) -> int:
    if isinstance(version, int) or version.isdecimal():
        return int(version)
    aliases = mlflow_api.aliases(door, name)
    if version not in aliases:
        raise KshotError(f"{name} has no alias {version!r}; it has: {', '.join(sorted(aliases)) or 'none'}")
    return aliases[version]


def _download(uri: str) -> str:
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as scratch:
        return Path(download_artifacts(uri, dst_path=scratch, tracking_uri=stores.uri())).read_text()


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file, by its path in the folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _from_run(tags: Mapping[str, str]) -> dict[str, str]:
    """What a version takes over from its run."""
    names = {
        "kshot.recipe": "recipe",
        "kshot.data": "data",
        "kshot.data.version": "data.version",
        "kshot.data.others": "data.others",
        "mlflow.source.git.commit": "commit",
        "kshot.git.dirty": "dirty",
        "kshot.prefect.flow_run": "prefect.flow_run",
    }
    return {short: tags[long] for long, short in names.items() if long in tags}
