"""The results that pipeline steps pass to each other: names, paths and hashes, never live objects.

`identity` determines the cache keys of later steps, and `intact` checks that the files that a result
names still exist unchanged.
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
    """A file of the project: its relative path and its sha256."""

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
    """One data set: its name and its version."""

    name: str
    version: str  # sha256 of the index, which contains that of the images
    source: str
    md5: str | None = None  # DVC's hash in data.dvc, '....dir'; None outside DVC

    def open(self) -> ImageSet:
        return ImageSet.open(versioning.data_root() / self.name)


@dataclass(frozen=True)
class DataVersion:
    """The versions of a recipe's data sets at the start of the pipeline."""

    own: Packed
    others: tuple[Packed, ...]
    rotations: bool  # whether rotations of its own data set's classes are classes too
    protocol: Protocol = "random photos"  # the protocol of drawing episodes

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
        """Whether the data sets are unchanged, to the byte, and data.dvc still records them."""
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
        """The classes of a split reference, concatenated over its data sets."""
        parts = [packed.open().split(splits, self._turned(packed)) for packed, splits in self.parts(reference)]
        return ClassImages.joined(parts).with_protocol(self.protocol)

    def parts(self, *references: str | None) -> list[tuple[Packed, str]]:
        """The data sets that split references name, each with its splits."""
        known = {packed.name: packed for packed in self.all}
        return [(known[name], splits) for r in references if r for name, splits in splits_of(r, self.name).items()]

    def identity_of(self, *references: str | None) -> str:
        """An identity of split references: the version of their data set, or a hash of several."""
        parts = self.parts(*references)
        versions = {packed.version for packed, _ in parts}
        if len(versions) == 1:
            return versions.pop()
        content = [(packed.version, splits, self._turned(packed)) for packed, splits in parts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def split_of(self, reference: str) -> tuple[str, bool]:
        """The splits of a reference without data sets' names (see `identity_of`), and whether they have rotations."""
        parts = self.parts(reference)
        splits = parts[0][1] if len(parts) == 1 else reference
        return splits, any(self._turned(packed) for packed, _ in parts)

    def refs(self, dataset: DataSettings) -> list[runs.DataRef]:
        """For MLflow: each data set, the recipe's own first, with its uses in the recipe."""
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
    """A candidate head, and its accuracy on validation episodes of each shape."""

    label: str
    shapes: tuple[Shape, ...]
    accuracies: tuple[float, ...]
    margins: tuple[float, ...]
    seconds: float
    chosen: bool

    @property
    def accuracy(self) -> float:
        """The mean accuracy over the shapes, by which a head is selected."""
        return sum(self.accuracies) / len(self.accuracies)


@dataclass(frozen=True)
class Trained:
    """A learner, meta-trained or selected; its file names its recipe and data."""

    learner: Pin
    data: DataVersion
    run: str  # the MLflow run with its learning curve
    steps: int
    best_step: int
    shape: Shape | None  # of the validation episodes; None where there were no classes for them
    validation: float | None  # accuracy there
    margin: float | None
    seconds: float
    chosen: str = ""  # the head and its settings, if it was selected among several
    tried: tuple[Attempt, ...] = ()  # all candidates
    memory: int = 0  # peak memory of training steps in bytes; 0 if this process ran none

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
    """One row of the result: accuracy on episodes of one shape."""

    shape: Shape
    episodes: int
    transductive: bool
    protocol: str  # "random photos", or "across groups": support and queries of a class from different groups
    accuracy: float
    margin: float
    ece: float
    open_set: OpenSet | None = None  # None without validation classes, or without test classes that can be unknown

    @property
    def key(self) -> str:
        """The line's name in the file of arrays."""
        across = "-groups" if self.protocol.startswith("across groups") else ""
        return f"{self.shape.ways}w{self.shape.shots}s{across}{'-transductive' if self.transductive else ''}"


@dataclass(frozen=True)
class Scores:
    """Results of a learner on test episodes, and its calibration on validation episodes."""

    lines: tuple[Line, ...]  # the gate compares the first, and the bundle states it
    calibrations: tuple[Calibration, ...]  # at the sizes of the test episodes, if there are enough classes
    verification: Verification | None  # None without validation classes, as are calibrations
    report: Pin  # the same results as JSON
    arrays: Pin  # accuracy of every episode, confidence and correctness of every query
    seed: int
    split: str
    learner: Trained
    data: DataVersion

    def calibration_for(self, shape: Shape) -> Calibration | None:
        """The calibration at the nearest episode size; shots are compared first, as in a bundle."""
        return min(
            self.calibrations,
            key=lambda fit: (abs(fit.shape.shots - shape.shots), abs(fit.shape.ways - shape.ways)),
            default=None,
        )

    def cosine(self) -> np.ndarray | None:
        """The baseline: per-episode accuracy of the first line by cosine to class means on the same backbone."""
        with np.load(self.arrays.file) as arrays:
            return arrays.get("cosine.accuracies")

    def label(self, line: Line) -> str:
        """A line in words, with the protocol unless all lines use random photos."""
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
    """An exported bundle, compared with torch."""

    files: tuple[Pin, ...]
    agreement: float  # share of test queries with equal predictions of ONNX and torch
    largest_difference: float  # largest difference of their logits
    latency_ms: float  # latency of classifying one photo

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
    """A registered version."""

    name: str
    version: int
    run: str
    store: str  # the registry's label
    evidence: Pin  # measurements for the gate
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
    """The gate's verdict on a version, and its resulting stage."""

    name: str
    version: int
    stage: str
    champion: int | None  # the version in production that it was compared with
    why: str
    judged: bool = True  # None if the champion could not be evaluated
    warnings: tuple[str, ...] = ()  # shown to users

    @property
    def identity(self) -> str:
        return f"{self.name} {self.version} {self.stage}"

    @property
    def stands(self) -> str:
        """Its stage as a phrase after "version 1"."""
        from kshot_flows.registry import Stage

        return Stage(self.stage).said

    def intact(self) -> bool:
        """Whether neither this version nor, if it waits in staging, the champion has moved since.

        Stages are from the audit log; if MLflow's stages or aliases differ from it, the result is not intact.
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
    """A path relative to the project, if it is inside it."""
    path = path.absolute()
    return str(path.relative_to(project.home())) if path.is_relative_to(project.home()) else str(path)
