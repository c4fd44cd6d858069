"""What a model's log of moves says: who is in which stage, who served before, which moves came too late.

No MLflow here: entries in, stages out, the same for everyone who reads the same entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from kshot_runtime.errors import KshotError


class Stage(StrEnum):
    """Where a version stands, in MLflow's words."""

    NONE = "None"
    STAGING = "Staging"
    PRODUCTION = "Production"
    ARCHIVED = "Archived"

    @classmethod
    def of(cls, text: str) -> Stage:
        for stage in cls:
            if stage.lower() == text.lower():
                return stage
        raise KshotError(f"no stage {text!r}; there are {', '.join(stage.lower() for stage in cls)}")


SINGLE = (Stage.PRODUCTION, Stage.STAGING)  # hold one version at a time, under an alias of the same name


class StageConflictError(KshotError):
    """Someone else was faster: the stage no longer holds the version that was expected there."""


class GateClosedError(KshotError):
    """The version's gate report does not allow the move."""


class Unset:
    """No expectation: `None` already means that nobody is expected."""


ANY: Final = Unset()


@dataclass(frozen=True)
class Audit:
    """One entry of the log: a version's move, or an attempt that came too late."""

    id: str
    number: int
    name: str
    version: int
    came_from: Stage
    stage: Stage
    displaced: int | None  # the version that this one pushed into the archive
    who: str
    when: datetime
    why: str
    report: str | None  # URI of the gate report
    rollback: bool = False
    refused: str | None = None  # why it did not count

    def __str__(self) -> str:
        verb = "rolled back to" if self.rollback else "moved to"
        return f"version {self.version} was {verb} {self.stage} by {self.who} on {local_time(self.when)} ({self.why})"


@dataclass
class Log:
    """A model's moves, read from the first to the last, and what follows from them."""

    name: str
    entries: list[Audit] = field(default_factory=list)
    numbers: set[int] = field(default_factory=set)
    stages: dict[int, Stage] = field(default_factory=dict)  # of each version that was ever moved
    served: list[int] = field(default_factory=list)  # what was in production, in turn; rolling back takes away

    def holder(self, stage: Stage) -> int | None:
        """The version in a stage that holds one."""
        return next((version for version, where in self.stages.items() if where is stage), None)

    def add(self, number: int, when: datetime, entry: Mapping[str, Any]) -> None:
        """Let the next entry count, or refuse it because the stage is not as it expects.

        A request that was sent twice is one entry.
        """
        self.numbers.add(number)
        if any(known.id == entry["id"] for known in self.entries):
            return
        version, stage = int(entry["version"]), Stage(entry["stage"])
        before = self.holder(stage) if stage in SINGLE else None
        refused = self.conflict(stage, entry["expect"]) if "expect" in entry and entry["expect"] != before else None
        audit = Audit(
            id=entry["id"],
            number=number,
            name=self.name,
            version=version,
            came_from=self.stages.get(version, Stage.NONE),
            stage=stage,
            displaced=before if before != version and not refused else None,
            who=entry["who"],
            when=when,
            why=entry["why"],
            report=entry.get("report"),
            rollback=entry.get("rollback", False),
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

    def wanted(self, stages: Mapping[int, Stage]) -> dict[int, Stage]:
        """The stage that each version should have, given those they have.

        A version that kshot never moved keeps its own, unless that stage holds one version and is taken.
        """
        taken = {stage for stage in SINGLE if self.holder(stage) in stages}
        return {
            version: self.stages.get(version, Stage.ARCHIVED if stage in taken else stage)
            for version, stage in stages.items()
        }

    def conflict(self, stage: Stage, expected: int | None) -> str:
        """The sentence for whoever expected another version in a stage."""
        changes = [entry for entry in self.entries if not entry.refused and stage in (entry.stage, entry.came_from)]
        return (
            f"{the(expected)} was expected in {stage} of {self.name}, but {the(self.holder(stage))} is there"
            + (f": {changes[-1]}." if changes else ".")
            + f" Nothing was moved; see kshot history {self.name}."
        )


def the(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"


def local_time(when: datetime) -> str:
    """To the second, in this machine's time zone."""
    return f"{when.astimezone():%Y-%m-%d %H:%M:%S}"
