"""The registry: versions of a model with their bundles, the stage that each is in, and what led to it.

Stages are defined by an audit log (`kshot_flows.registry.moves`): who moved a version where, when and why. MLflow's
stages, tags and aliases are updated from it.
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

from kshot_flows.registry import logged_model, mlflow_api, moves
from kshot_flows.registry.gate import GateReport
from kshot_flows.registry.log import (
    ANY,
    SINGLE,
    AlreadyThereError,
    Audit,
    GateClosedError,
    Stage,
    StageConflictError,
    Unset,
    UnsettledError,
    local_time,
    the,
)
from kshot_flows.registry.logged_model import CLAIM
from kshot_flows.tracking import stores
from kshot_runtime.errors import KshotError

__all__ = [
    "ANY", "CLAIM", "AlreadyThereError", "Audit", "GateClosedError", "Stage", "StageConflictError", "Trace",
    "UnsettledError", "Version", "accuracy", "champion", "check_name", "disagreements", "fetch_bundle", "gate_report",
    "history", "identity", "local_time", "log_model", "models", "move", "promote", "record_gate", "register",
    "rollback", "settle", "trace", "versions",
]  # fmt: skip

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DESCRIPTION = 5000  # maximal length of a version's description in MLflow's databases
_FILES = ("adapt.onnx", "classify.onnx", "bundle.json")  # files of every bundle; some also have embed.onnx


@dataclass(frozen=True)
class Version:
    """One version of a model: its stage from the audit log, the rest from MLflow."""

    name: str
    version: int
    stage: Stage
    aliases: tuple[str, ...]
    when: datetime
    run: str | None
    source: str
    tags: Mapping[str, str]

    def number(self, tag: str) -> float | None:
        """A tag's value as a number; None if it is not one."""
        try:
            return float(self.tags[tag])
        except (KeyError, ValueError):
            return None

    def to_dict(self) -> dict[str, Any]:
        """As a dict with stable keys; unknown values are None or empty."""
        tags = self.tags
        return {
            "name": self.name,
            "version": self.version,
            "stage": self.stage.lower(),
            "aliases": list(self.aliases),
            "registered": self.when.isoformat(timespec="seconds"),
            "accuracy": self.number("accuracy"),
            "margin": self.number("margin"),
            "gate": tags.get("gate"),
            "gate_report": tags.get("gate.report"),
            "warnings": tags.get("gate.warnings", ""),
            "recipe": tags.get("recipe"),
            "data": tags.get("data"),
            "data_sha256": tags.get("data.version"),
            "other_data_sha256": tags.get("data.others"),
            "git_commit": tags.get("commit"),
            "git_dirty": tags.get("dirty") == "true",
            "mlflow_run": self.run,
            "prefect_run": tags.get("prefect.flow_run"),
            "source": self.source,
            "sha256": {key.removeprefix("sha256."): v for key, v in sorted(tags.items()) if key.startswith("sha256.")},
        }


@dataclass(frozen=True)
class Trace:
    """The provenance of a version, and its moves."""

    version: Version
    history: Sequence[Audit]

    @property
    def facts(self) -> dict[str, str]:
        """Its provenance as labelled text, without unknown values."""
        tags, run = self.version.tags, self.version.run
        facts = {
            "stage": str(self.version.stage),
            "aliases": ", ".join(self.version.aliases),
            "registered": local_time(self.version.when),
            "accuracy": accuracy(tags),
            "data (DVC)": tags.get("data", ""),
            "data (sha256)": tags.get("data.version", ""),
            "other data (sha256)": tags.get("data.others", ""),
            "git commit": tags.get("commit", "") + (" + changes (git.diff)" if tags.get("dirty") == "true" else ""),
            "MLflow run": run or "",
            "Prefect run": tags.get("prefect.flow_run", ""),
            "recipe": tags.get("recipe", "") + (f" (runs:/{run}/recipe.json)" if run else ""),
            "bundle": self.version.source,
            **{key: value for key, value in sorted(tags.items()) if key.startswith("sha256.")},
            "gate": " ".join(filter(None, [tags.get("gate"), tags.get("gate.report")])),
            "mind": tags.get("gate.warnings", ""),
        }
        return {key: value for key, value in facts.items() if value}


def check_name(name: str) -> None:
    """Refuse an invalid model name."""
    if not re.fullmatch(r"[\w-][\w.-]*", name) or name.endswith(moves.SUFFIX):
        raise KshotError(
            f"{name!r} cannot name a model: letters, digits, '.', '-' and '_' can, but {moves.SUFFIX!r} at its end"
        )


def log_model(name: str, run_id: str, bundle: Path, note: str = "") -> str:
    """Log a bundle as a logged model of its run, loadable by `mlflow.pyfunc`; idempotent."""
    door = stores.client()
    run = door.get_run(run_id)
    return str(logged_model.log(door, name, run, bundle, identity(bundle), note).model_id)


def register(name: str, run_id: str, bundle: Path, *, tags: Mapping[str, str] | None = None, card: str = "") -> int:
    """Register a bundle, by its logged model, as a version of the model `name`; the same bundle gives the same version.

    So `models:/NAME/VERSION` is an MLflow model, and its folder has the files of the bundle. The version's description
    is the `card`; its tags carry the files' sha256, the data hash and git commit of the run, and what the caller adds
    (`accuracy` and `margin`, as shares of 1, are shown by `kshot models`). It is there with all of this or not at all.
    """
    check_name(name)
    missing = [file for file in _FILES if not (bundle / file).is_file()]
    if missing:
        raise KshotError(f"{bundle} is not a bundle: it lacks {', '.join(missing)}. `kshot run` makes one.")
    hashes = _hashes(bundle)
    this = _identity(hashes)
    door = stores.client()
    mlflow_api.create_model(
        door, name, f"Few-shot learners made by kshot. Their moves between stages: {name}{moves.SUFFIX}"
    )
    run = door.get_run(run_id)
    model = logged_model.log(door, name, run, bundle, this, card)
    known = [known for known in mlflow_api.versions(door, name) if known.run_id == run_id]
    made = next((known for known in known if known.tags.get("bundle") == this), None) or door.create_model_version(
        name,
        source=model.artifact_location,
        run_id=run_id,
        model_id=model.model_id,
        description=card[:_DESCRIPTION],
        await_creation_for=0,  # it is ready at once; waiting would only write log lines
        tags={
            "stage": Stage.NONE,
            "bundle": this,
            **{f"sha256.{file}": sha256 for file, sha256 in hashes.items()},
            **_from_run(run.data.tags),
            **(tags or {}),
        },
    )
    logged_model.link(door, model, name, int(made.version))
    return int(made.version)


def identity(bundle: Path) -> str:
    """A hash that identifies these files."""
    return _identity(_hashes(bundle))


def move(
    name: str,
    version: int,
    stage: Stage | str,
    *,
    why: str,
    who: str | None = None,
    expect: int | Unset | None = ANY,
) -> Audit:
    """Move a version to a stage; in staging and production the previous version is archived.

    `expect` is the version believed to be in that stage now (None: nobody); if it is another, nothing moves and a
    StageConflictError says who changed it.
    """
    stage = Stage.of(stage)
    if stage not in SINGLE and expect is not ANY:
        raise KshotError(f"{stage} holds any number of versions, so none can be expected there")
    return moves.record(stores.client(), name, version, stage, why=why, who=who, expect=expect)


def promote(
    name: str, version: int, stage: Stage | str, *, why: str | None = None, who: str | None = None, force: bool = False
) -> Audit:
    """Move a version; production requires a gate report that passed against the present champion.

    `force` bypasses the gate, or takes the champion out of production, and needs `why`.
    """
    stage = Stage.of(stage)
    if force and not why:
        raise KshotError("--force needs a reason: add --why")
    door = stores.client()
    mlflow_api.existing(door, name, version)
    log, _ = moves.settle(door, name)
    if log.stage(version) is stage:
        raise AlreadyThereError(f"{name}: version {version} {stage.said} already; nothing was moved")
    if log.stage(version) is Stage.PRODUCTION and not force:
        raise GateClosedError(
            f"version {version} of {name} is in production, and without it nothing would be: servers that run keep it, "
            f"and new ones have no model. If that is meant: kshot promote {name} {version} {stage.lower()} --force "
            f"--why REASON; to give production back to the version before: kshot rollback {name}"
        )
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
    """Return production to the previous production version, and archive the present one.

    Repeated calls go back through all earlier production versions.
    """
    door = stores.client()
    log, _ = moves.settle(door, name)
    there = {int(version.version) for version in mlflow_api.versions(door, name)}
    last = log.served[-1:]  # empty or missing from MLflow if it was taken out of production or deleted
    before = [version for version in log.served if version in there and version not in last]
    if not before:
        raise KshotError(
            f"no version of {name} served before {the(last[0]) if last else 'any other'}, so there is none to go back "
            f"to; see kshot history {name}"
        )
    champion = log.holder(Stage.PRODUCTION)
    return moves.record(door, name, before[-1], Stage.PRODUCTION, why=why, who=who, expect=champion, back=True)


def champion(name: str) -> int | None:
    """The version in production; None if there is none, or no such model yet."""
    door = mlflow_api.reader()
    version = moves.read_log(door, name).holder(Stage.PRODUCTION)
    there = version is not None and any(int(known.version) == version for known in mlflow_api.versions(door, name))
    return version if there else None


def models() -> list[str]:
    """The names of all models, except audit logs."""
    return mlflow_api.models(mlflow_api.reader())


def versions(name: str) -> list[Version]:
    """All versions of a model, the newest first."""
    door = mlflow_api.reader()
    aliases, log = mlflow_api.aliases(door, name), moves.read_log(door, name)
    found = [
        Version(
            name=name,
            version=int(version.version),
            stage=log.stage(int(version.version)) if log.entries else Stage(version.current_stage),
            aliases=tuple(sorted(alias for alias, holder in aliases.items() if holder == int(version.version))),
            when=mlflow_api.moment(version.creation_timestamp),
            run=version.run_id,
            source=version.source or "",
            tags=version.tags,
        )
        for version in mlflow_api.versions(door, name)
    ]
    return sorted(found, key=lambda version: -version.version)


def history(name: str, *, refused: bool = False) -> list[Audit]:
    """All moves of a model's versions, oldest first; with `refused`, also attempts that lost to a concurrent move."""
    door = mlflow_api.reader()
    mlflow_api.model(door, name)
    return [entry for entry in moves.read_log(door, name).entries if refused or not entry.refused]


def disagreements(name: str) -> list[str]:
    """Differences of MLflow's stages, tags or aliases from the log, one sentence each."""
    log, shown = moves.look(mlflow_api.reader(), name)
    return moves.differences(log, shown) if shown.ours else []


def settle(name: str) -> list[str]:
    """Complete interrupted moves, and record moves made in MLflow; returns one sentence for each."""
    if moves.in_order(*moves.look(mlflow_api.reader(), name)):
        return []
    return moves.settle(stores.client(), name)[1]


def record_gate(name: str, version: int, report: Mapping[str, Any]) -> str:
    """Store a gate report with the version's run, and its verdict as a tag of the version. Returns the report's URI."""
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
    """The provenance of a version (data, code, recipe, runs), and its moves."""
    door = mlflow_api.reader()
    mlflow_api.existing(door, name, version)
    known = next(one for one in versions(name) if one.version == version)
    entries = moves.read_log(door, name).entries
    return Trace(known, [entry for entry in entries if version in (entry.version, entry.displaced)])


def fetch_learner(name: str, version: int | str, folder: Path) -> Path:
    """Download the `learner.pt` from which a version (a number, or an alias such as 'production') was exported."""
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
    """Download the bundle of a version (a number, or an alias such as 'production'), and verify every hash.

    `folder` is created atomically. If it already contains this bundle, nothing is done.
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
        bad = sorted(file for file, sha256 in wanted.items() if hashes.get(file) != sha256)
        if bad:
            raise KshotError(
                f"version {number} of {name} is not what was registered: {', '.join(bad)} changed in {known.source}. "
                "Do not use it; restore the files, or register the bundle anew."
            )
        for file in hashes.keys() - wanted.keys():  # files of the MLflow model
            (got / file).unlink()
        if folder.exists():
            folder.rmdir()
        shutil.move(got, folder)
    return folder


def accuracy(tags: Mapping[str, str]) -> str:
    """A version's accuracy with its margin, as text."""
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


def _identity(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def _from_run(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags that a version copies from its run."""
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
