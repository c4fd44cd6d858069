"""A model's audit log: current stages, earlier production versions, and moves that were made outside kshot.

Independent of MLflow: stages are computed deterministically from the entries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from kshot_runtime.errors import KshotError


class Stage(StrEnum):
    """The stage of a version, in MLflow's terms."""

    NONE = "None"
    STAGING = "Staging"
    PRODUCTION = "Production"
    ARCHIVED = "Archived"

    @property
    def said(self) -> str:
        """The stage as a phrase after "version 1"."""
        return {"None": "is in no stage", "Archived": "is archived"}.get(self.value, f"is in {self.lower()}")

    @classmethod
    def of(cls, text: str) -> Stage:
        for stage in cls:
            if stage.lower() == text.lower():
                return stage
        raise KshotError(f"no stage {text!r}; there are {', '.join(stage.lower() for stage in cls)}")


SINGLE = (Stage.PRODUCTION, Stage.STAGING)  # hold one version at a time, under an alias of the same name
ELSEWHERE = "someone in MLflow"  # who made the moves that are found there: MLflow does not say who did


class StageConflictError(KshotError):
    """A concurrent move came first: the stage no longer holds the expected version."""


class GateClosedError(KshotError):
    """The version's gate report does not allow the move."""


class UnsettledError(KshotError):
    """MLflow was not updated, or not completely, after a move."""


class AlreadyThereError(KshotError):
    """The version is already in that stage."""


class Unset:
    """Sentinel for no expectation, as `None` means that no version is expected."""


ANY: Final = Unset()


@dataclass(frozen=True)
class Audit:
    """A log entry: a version's move, or an attempt that lost to a concurrent move."""

    id: str
    number: int
    name: str
    version: int
    came_from: Stage
    stage: Stage
    displaced: int | None  # the version that this move archived
    who: str
    when: datetime
    why: str
    report: str | None  # URI of the gate report
    rollback: bool = False
    adopted: bool = False  # made in MLflow's pages or by another client, and recorded later
    refused: str | None = None  # why it did not count

    def to_dict(self) -> dict[str, Any]:
        """As a dict with stable keys."""
        return {
            "number": self.number,
            "when": self.when.isoformat(timespec="seconds"),
            "version": self.version,
            "from": self.came_from.lower(),
            "to": self.stage.lower(),
            "archived": self.displaced,
            "who": self.who,
            "why": self.why,
            "gate_report": self.report,
            "rollback": self.rollback,
            "adopted": self.adopted,
            "refused": self.refused,
        }

    def __str__(self) -> str:
        verb = "rolled back to" if self.rollback else "moved to"
        return f"version {self.version} was {verb} {self.stage} by {self.who} on {local_time(self.when)} ({self.why})"


@dataclass
class Log:
    """A model's moves in order, and the stages that result from them."""

    name: str
    entries: list[Audit] = field(default_factory=list)
    numbers: set[int] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    stages: dict[int, Stage] = field(default_factory=dict)  # of each version that was ever moved
    served: list[int] = field(default_factory=list)  # production versions in order; a rollback removes the last

    @property
    def newest(self) -> int:
        return max(self.numbers, default=0)

    def stage(self, version: int) -> Stage:
        return self.stages.get(version, Stage.NONE)

    def holder(self, stage: Stage) -> int | None:
        """The version in a stage that holds a single version."""
        return next((version for version, where in self.stages.items() if where is stage), None)

    def add(self, number: int, when: datetime, entry: Mapping[str, Any]) -> None:
        """Apply the next entry, or refuse it if the stage is not as expected.

        An adopted move is refused if a move of kshot's was recorded after it was found. A request that was sent twice
        is one entry.
        """
        self.numbers.add(number)
        if entry["id"] in self.ids:
            return
        self.ids.add(entry["id"])
        version, stage = int(entry["version"]), Stage(entry["stage"])
        before = self.holder(stage) if stage in SINGLE else None
        refused = self.conflict(stage, entry["expect"]) if "expect" in entry and entry["expect"] != before else None
        if adopted := "found_after" in entry:
            since = [one for one in self.entries if one.number > entry["found_after"]]
            newer = [one for one in since if not one.adopted and not one.refused]
            refused = f"overtaken by entry {newer[-1].number}: {newer[-1]}" if newer else None
        audit = Audit(
            id=entry["id"],
            number=number,
            name=self.name,
            version=version,
            came_from=self.stage(version),
            stage=stage,
            displaced=before if before != version and not refused else None,
            who=entry["who"],
            when=when,
            why=entry["why"],
            report=entry.get("report"),
            rollback=entry.get("rollback", False),
            adopted=adopted,
            refused=refused,
        )
        self.entries.append(audit)
        if refused:
            return
        if audit.displaced is not None:
            self.stages[audit.displaced] = Stage.ARCHIVED
        self.stages[version] = stage
        if audit.rollback and version in self.served:
            while self.served[-1] != version:
                self.served.pop()
        elif stage is Stage.PRODUCTION and self.served[-1:] != [version]:
            self.served.append(version)

    def foreign(
        self, stages: Mapping[int, Stage], aliases: Mapping[str, int], settled: int
    ) -> list[tuple[int, Stage, str]]:
        """Moves found in MLflow but not in the log: version, stage and evidence, in the order to add them.

        What the log said at any entry since `settled`, the last that MLflow is known to have followed, is no foreign
        move but a move of kshot's on its way. Where a stage and its alias were both set, to different versions, the
        alias counts, because serving reads it; a version under both aliases is in production.
        """
        recent = [entry for entry in self.entries if entry.number > settled and not entry.refused]
        said = defaultdict(set, {version: {self.stage(version)} for version in stages})
        held: dict[Stage, set[int | None]] = {single: {self.holder(single)} for single in SINGLE}
        for entry in recent:
            # Stage changes that follow from an adopted move are pending too, not foreign.
            said[entry.version] |= set(Stage) if entry.adopted else {entry.came_from, entry.stage, Stage.ARCHIVED}
            if entry.displaced is not None:
                said[entry.displaced] |= {entry.stage, Stage.ARCHIVED}
            for single in {entry.stage, entry.came_from} & held.keys():
                held[single] |= {entry.version, None}
            if entry.stage in held:
                held[entry.stage].add(entry.displaced)
        strange = {version: stage for version, stage in stages.items() if stage not in said[version]}
        found: list[tuple[int, Stage, str]] = []
        expected = dict(self.stages)  # what the log will say with what was found

        def add(version: int, stage: Stage, how: str) -> None:
            for other in [other for other, where in expected.items() if where is stage and stage in SINGLE]:
                expected[other] = Stage.ARCHIVED
            expected[version] = stage
            found.append((version, stage, how))

        champion: int | None = None  # set below: what staging cannot have
        for single in SINGLE:
            alias, holder = aliases.get(single.lower()), self.holder(single)
            claims = [version for version, stage in strange.items() if stage is single and version != champion]
            stays = holder if holder in stages and holder not in strange and holder != champion else None
            if holder is not None and holder not in stages:
                add(holder, Stage.NONE, "the version was deleted from the registry")
                held[single].add(None)
            if alias is not None and alias not in held[single] and alias != champion:
                add(alias, single, f"the alias {single.lower()} was set to it")
                stays = alias
            elif claims:
                add(max(claims), single, f"its stage was set to {single}")
                stays = max(claims)
            elif alias is None and None not in held[single] and stays is not None:
                add(stays, Stage.ARCHIVED, f"the alias {single.lower()} was removed")
                stays = None
            champion = stays if single is Stage.PRODUCTION else champion
        moved = {version for version, _, _ in found}
        for version, stage in sorted(strange.items()):
            lost = stage in SINGLE  # to another version that was put there too
            if version not in moved and (lost or expected.get(version, Stage.NONE) is not stage):
                add(version, Stage.ARCHIVED if lost else stage, f"its stage was set to {stage}")
        return found

    def conflict(self, stage: Stage, expected: int | None) -> str:
        """The message for a move that expected another version in a stage."""
        changes = [entry for entry in self.entries if not entry.refused and stage in (entry.stage, entry.came_from)]
        return (
            f"{the(expected)} was expected in {stage} of {self.name}, but {the(self.holder(stage))} is there"
            + (f": {changes[-1]}." if changes else ".")
            + f" Nothing was moved; see kshot history {self.name}."
        )


def the(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"


def local_time(when: datetime) -> str:
    """A time to the second, in the local time zone."""
    return f"{when.astimezone():%Y-%m-%d %H:%M:%S}"
