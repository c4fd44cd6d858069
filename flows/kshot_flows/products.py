"""What the steps of the pipeline hand to each other: names, paths and hashes, never live objects.

Each says what it stands for in `identity`, which the keys of later steps are made from, and can check in `intact`
that what it points to is still there and still the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kshot.calibration import Calibration
from kshot.datasets import ImageSet, file_sha256
from kshot.episodes import Shape
from kshot_flows import tracking, versioning
from kshot_runtime.errors import KshotError


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
        return tracking.home() / self.path

    def intact(self) -> bool:
        return self.file.is_file() and file_sha256(self.file) == self.sha256


@dataclass(frozen=True)
class DataVersion:
    """A data set as it was when the pipeline began."""

    name: str
    version: str  # sha256 of the index, which holds that of the images
    md5: str | None  # what DVC calls the data folder; None outside DVC
    source: str
    rotations: bool  # whether classes are turned as well, which makes other episodes

    @property
    def identity(self) -> str:
        return self.version

    def intact(self) -> bool:
        """Whether its name still stands for it, to the byte, and data.dvc still names it."""
        root = versioning.data_root()
        try:
            found = self.open()
            found.verify()
        except KshotError:
            return False
        return found.version == self.version and versioning.recorded(root) == self.md5

    def open(self) -> ImageSet:
        return ImageSet.open(versioning.data_root() / self.name)

    def ref(self) -> tracking.DataRef:
        return tracking.DataRef(self.name, self.version, self.md5, self.source)


@dataclass(frozen=True)
class Trained:
    """A meta-trained learner: its file says by which recipe and on which data."""

    learner: Pin
    data: DataVersion
    run: str  # the MLflow run that has its numbers over time
    steps: int
    best_step: int
    validation: float  # accuracy there
    margin: float
    seconds: float

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
    accuracy: float
    margin: float
    ece: float

    @property
    def label(self) -> str:
        return f"{self.shape.ways}-way {self.shape.shots}-shot{', transductive' if self.transductive else ''}"

    @property
    def key(self) -> str:
        """Its name in the file of arrays."""
        return f"{self.shape.ways}w{self.shape.shots}s{'-transductive' if self.transductive else ''}"


@dataclass(frozen=True)
class Scores:
    """What test episodes said of a learner, and validation episodes of its confidence."""

    lines: tuple[Line, ...]  # the first is what the gate compares and the bundle states
    calibrations: tuple[Calibration, ...]  # one for each number of shots
    report: Pin  # the same as JSON
    arrays: Pin  # accuracy of every episode, confidence and rightness of every query
    seed: int
    split: str
    learner: Trained

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

    @property
    def identity(self) -> str:
        return f"{self.name} {self.version} {self.stage}"

    def intact(self) -> bool:
        """Whether nothing has moved since: neither this version nor, where it waits, the one it has to beat."""
        from kshot_flows import registry

        stages = {known.version: known.stage for known in registry.versions(self.name)}
        if stages.get(self.version) != self.stage:
            return False
        return self.stage == "Production" or registry.champion(self.name) == self.champion


Product = DataVersion | Trained | Scores | Exported | Registered | Promotion


def relative(path: Path) -> str:
    """A path as seen from the project, where it lies in it."""
    path = path.absolute()
    return str(path.relative_to(tracking.home())) if path.is_relative_to(tracking.home()) else str(path)
