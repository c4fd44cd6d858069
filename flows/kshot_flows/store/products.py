"""What the steps of the pipeline hand to each other: names, paths and hashes, never live objects.

Each says what it stands for in `identity`, which the keys of later steps are made from, and can check in `intact`
that what it points to is still there and still the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kshot.data.datasets import ClassImages, ImageSet, Protocol, file_sha256, splits_of
from kshot.data.episodes import Shape
from kshot.evaluation.calibration import Calibration
from kshot.evaluation.open_set import OpenSet
from kshot.evaluation.verification import Verification
from kshot_flows import project
from kshot_flows.data import versioning
from kshot_flows.tracking import runs
from kshot_runtime.errors import KshotError

if TYPE_CHECKING:
    from kshot.recipe import DataSettings


@dataclass(frozen=True)
class Pin:
    """A file of the project, by its path in it and its content."""

    path: str
    sha256: str

    @classmethod
    def of(cls, file: Path) -> Pin:
        return cls(relative(file), file_sha256(file))

    @property
    def file(self) -> Path:
        return project.home() / self.path

    def intact(self) -> bool:
        return self.file.is_file() and file_sha256(self.file) == self.sha256


@dataclass(frozen=True)
class Packed:
    """One data set, by its name and its content."""

    name: str
    version: str  # sha256 of the index, which holds that of the images
    source: str
    md5: str | None = None  # what DVC calls it in data.dvc, '....dir'; None outside DVC

    def open(self) -> ImageSet:
        return ImageSet.open(versioning.data_root() / self.name)


@dataclass(frozen=True)
class DataVersion:
    """A recipe's data sets as they were when the pipeline began: its own, and others that its splits name."""

    own: Packed
    others: tuple[Packed, ...]
    rotations: bool  # whether classes of the own one are turned as well, which makes other episodes
    protocol: Protocol = "random photos"  # how episodes are drawn

    @property
    def name(self) -> str:
        return self.own.name

    @property
    def version(self) -> str:
        return self.own.version

    @property
    def md5(self) -> str | None:
        return self.own.md5

    @property
    def all(self) -> tuple[Packed, ...]:
        return self.own, *self.others

    @property
    def identity(self) -> str:
        return "".join(packed.version for packed in self.all)

    def intact(self) -> bool:
        """Whether their names still stand for them, to the byte, and data.dvc still names them."""
        root = versioning.data_root()
        try:
            return all(
                versioning.verified(packed.name, root).version == packed.version
                and versioning.recorded(root, packed.name) == packed.md5
                and versioning.versioned(root) == (packed.md5 is not None)
                for packed in self.all
            )
        except KshotError:
            return False

    def open(self) -> ImageSet:
        return self.own.open()

    def classes(self, reference: str) -> ClassImages:
        """The classes of a split reference; several data sets' one after the other."""
        parts = [packed.open().split(splits, self._turned(packed)) for packed, splits in self.parts(reference)]
        return ClassImages.joined(parts).with_protocol(self.protocol)

    def parts(self, *references: str | None) -> list[tuple[Packed, str]]:
        """The data sets that some split references name, each with its splits."""
        known = {packed.name: packed for packed in self.all}
        return [(known[name], splits) for r in references if r for name, splits in splits_of(r, self.name).items()]

    def identity_of(self, *references: str | None) -> str:
        """What split references stand for: the version of the one data set that they name, or a hash of several."""
        parts = self.parts(*references)
        versions = {packed.version for packed, _ in parts}
        if len(versions) == 1:
            return versions.pop()
        content = [(packed.version, splits, self._turned(packed)) for packed, splits in parts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def split_of(self, reference: str) -> tuple[str, bool]:
        """A split's name where `identity_of` says whose, and whether it has rotations."""
        parts = self.parts(reference)
        splits = parts[0][1] if len(parts) == 1 else reference
        return splits, any(self._turned(packed) for packed, _ in parts)

    def refs(self, dataset: DataSettings) -> list[runs.DataRef]:
        """For MLflow: each data set, its own first, with what the recipe takes it for."""
        learned = {packed for packed, _ in self.parts(dataset.train, dataset.validation, dataset.unlabelled)}
        return [
            runs.DataRef(
                packed.name, packed.version, packed.md5, packed.source,
                context="meta-training" if packed in learned or packed == self.own else "test",
            )
            for packed in self.all
        ]  # fmt: skip

    def _turned(self, packed: Packed) -> bool:
        return self.rotations and packed == self.own


@dataclass(frozen=True)
class Attempt:
    """A head that was tried, and what it reached on validation episodes of each shape."""

    label: str
    shapes: tuple[Shape, ...]
    accuracies: tuple[float, ...]
    margins: tuple[float, ...]
    seconds: float
    chosen: bool

    @property
    def accuracy(self) -> float:
        """The mean over the shapes, by which a head is chosen."""
        return sum(self.accuracies) / len(self.accuracies)


@dataclass(frozen=True)
class Trained:
    """A learner, meta-trained or chosen: its file says by which recipe and on which data."""

    learner: Pin
    data: DataVersion
    run: str  # the MLflow run that has its numbers over time
    steps: int
    best_step: int
    shape: Shape | None  # of the validation episodes; None where there were no classes for them
    validation: float | None  # accuracy there
    margin: float | None
    seconds: float
    chosen: str = ""  # the head and its settings, where it was chosen among several
    tried: tuple[Attempt, ...] = ()  # those that it was chosen among
    memory: int = 0  # bytes that training steps held at most; 0 where this process took none

    @property
    def identity(self) -> str:
        return self.learner.sha256

    @property
    def folder(self) -> Path:
        return self.learner.file.parent

    def intact(self) -> bool:
        return self.learner.intact()


@dataclass(frozen=True)
class Line:
    """One row of the result: accuracy on one shape of episode."""

    shape: Shape
    episodes: int
    transductive: bool
    protocol: str  # "random photos", or "across groups": support and queries of a class from different groups
    accuracy: float
    margin: float
    ece: float
    open_set: OpenSet | None = None  # none without validation classes, or without test classes to be unknown

    @property
    def key(self) -> str:
        """Its name in the file of arrays."""
        across = "-groups" if self.protocol.startswith("across groups") else ""
        return f"{self.shape.ways}w{self.shape.shots}s{across}{'-transductive' if self.transductive else ''}"


@dataclass(frozen=True)
class Scores:
    """What test episodes said of a learner, and validation episodes of its confidence."""

    lines: tuple[Line, ...]  # the first is what the gate compares and the bundle states
    calibrations: tuple[Calibration, ...]  # at the sizes of the test episodes, as far as there are classes for them
    verification: Verification | None  # none without validation classes, as there are then no calibrations
    report: Pin  # the same as JSON
    arrays: Pin  # accuracy of every episode, confidence and rightness of every query
    seed: int
    split: str
    learner: Trained
    data: DataVersion

    def calibration_for(self, shape: Shape) -> Calibration | None:
        """The calibration at the size nearest to this one; shots count first, as in a bundle."""
        return min(
            self.calibrations,
            key=lambda fit: (abs(fit.shape.shots - shape.shots), abs(fit.shape.ways - shape.ways)),
            default=None,
        )

    def cosine(self) -> np.ndarray | None:
        """Accuracy of every episode of the first line by cosine to class means on the same backbone, as a baseline."""
        with np.load(self.arrays.file) as arrays:
            return arrays.get("cosine.accuracies")

    def label(self, line: Line) -> str:
        """A line in words, which name the protocol unless all lines are of random photos."""
        named = any(each.protocol != "random photos" for each in self.lines)
        words = [f"{line.shape.ways}-way {line.shape.shots}-shot", line.protocol if named else ""]
        return ", ".join(filter(None, [*words, "transductive" if line.transductive else ""]))

    @property
    def identity(self) -> str:
        return self.arrays.sha256 + self.report.sha256

    def intact(self) -> bool:
        return self.report.intact() and self.arrays.intact()


@dataclass(frozen=True)
class Exported:
    """A bundle, checked against torch."""

    files: tuple[Pin, ...]
    agreement: float  # share of test queries that ONNX and torch answer alike
    largest_difference: float  # between their logits
    latency_ms: float  # of classifying one photo

    @property
    def identity(self) -> str:
        return "".join(file.sha256 for file in self.files)

    @property
    def folder(self) -> Path:
        return self.files[0].file.parent

    def intact(self) -> bool:
        return all(file.intact() for file in self.files)


@dataclass(frozen=True)
class Registered:
    """A version in the registry."""

    name: str
    version: int
    run: str
    store: str  # which registry
    evidence: Pin  # what the gate judges by
    data: DataVersion

    @property
    def identity(self) -> str:
        return f"{self.store} {self.name} {self.version} {self.run}"

    def intact(self) -> bool:
        from kshot_flows import registry

        return self.evidence.intact() and any(
            known.version == self.version and known.run == self.run for known in registry.versions(self.name)
        )


@dataclass(frozen=True)
class Promotion:
    """The gate's verdict on a version, and the stage that it has by it."""

    name: str
    version: int
    stage: str
    champion: int | None  # the version that it was compared with
    why: str
    judged: bool = True  # not where the champion could not be measured
    warnings: tuple[str, ...] = ()  # what whoever uses it must know

    @property
    def identity(self) -> str:
        return f"{self.name} {self.version} {self.stage}"

    @property
    def stands(self) -> str:
        """Where it is, as it follows "version 1" in a sentence."""
        from kshot_flows.registry import Stage

        return Stage(self.stage).said

    def intact(self) -> bool:
        """Whether nothing has moved since, neither this version nor, where it waits, the one it has to beat.

        By the audit log; where MLflow shows other stages or aliases, which serving reads, there is something to do.
        """
        from kshot_flows import registry

        if not self.judged or registry.disagreements(self.name):
            return False
        stages = {known.version: known.stage for known in registry.versions(self.name)}
        if stages.get(self.version) != self.stage:
            return False
        return self.stage == "Production" or registry.champion(self.name) == self.champion


Product = DataVersion | Trained | Scores | Exported | Registered | Promotion


def relative(path: Path) -> str:
    """A path as seen from the project, where it lies in it."""
    path = path.absolute()
    return str(path.relative_to(project.home())) if path.is_relative_to(project.home()) else str(path)
