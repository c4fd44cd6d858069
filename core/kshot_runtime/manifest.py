"""The manifest of a bundle (bundle.json) as a type, and the checks of its files against it."""

from __future__ import annotations

import hashlib
import math
import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kshot_runtime.errors import KshotError
from kshot_runtime.images import ImageRule
from kshot_runtime.onnx_file import external_tensors

MANIFEST, EMBED, ADAPT, CLASSIFY, VIEWS = "bundle.json", "embed.onnx", "adapt.onnx", "classify.onnx", "views.onnx"
SCHEMA_VERSION: Literal[3] = 3

_LARGEST = {MANIFEST: 16 << 20} | dict.fromkeys((EMBED, ADAPT, CLASSIFY, VIEWS), 2 << 30)  # bytes; protobuf's limit


class BundleError(KshotError):
    """A bundle, or a request to one, that cannot be served, and why."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Measured = Annotated[float | None, BeforeValidator(lambda value: None if value != value else value)]
"""A figure that may not have been measured: none, or NaN."""
By = Literal["logit", "probability", "energy", "ratio", "nearest"]
"""What tells known queries from unknown ones; `kshot_runtime.bundle.evidence` computes it."""


class Plugin(_Part):
    """An algorithm or a backbone: its name, its settings, and the distribution that it came from."""

    name: str
    config: dict[str, Any] = {}
    distribution: str = ""
    version: str = ""


class Limits(_Part):
    """The most that one adaptation takes; they bound its time and memory."""

    ways: int = Field(1000, ge=1, description="classes")
    shots: int = Field(100, ge=1, description="support images of one class")
    support: int = Field(1000, ge=1, description="support images in all")
    steps: int = Field(1000, ge=0, description="inner steps, for a learner that takes steps")


class OperatingPoint(_Part):
    """What a threshold does: the share of known queries that pass it, and of unknown ones."""

    accepted: float = Field(ge=0, le=1)
    threshold: float
    false_accepts: Measured = None


class Verification(_Part):
    """When two images show one class: the probability is sigmoid(slope * similarity + offset)."""

    by: Literal["logit", "cosine", "distance"] = Field(
        description="the similarity: the logit of one after adapting to the other as the only class; or of the "
        "features the cosine, or the negative Euclidean distance"
    )
    slope: float
    offset: float
    auroc: Measured = Field(None, description="of telling pairs of one class from pairs of two")
    accuracy: Measured = Field(None, description="share of pairs judged right, as many same as different")
    pairs: int = Field(ge=2)


class Calibration(_Part):
    """How to read the logits at one size of episode, from validation classes that no training has seen."""

    ways: int = Field(ge=2)
    shots: int = Field(ge=1)
    temperature: float = Field(1.0, gt=0, description="divide logits by it before the softmax")
    by: By = Field(
        "probability",
        description="what the threshold is compared with: the largest logit; the largest probability at the "
        "temperature; the logmeanexp of the logits over the temperature; or the output of classify.onnx of that name, "
        "a log-likelihood ratio or the cosine of the nearest support image",
    )
    threshold: Measured = Field(
        None,
        description="a query below it belongs to none of the classes; by default it balances both errors: as large a "
        "share of known queries fails it as of unknown ones passes",
    )
    accepted: Measured = Field(None, description="share of known queries that pass the threshold")
    false_accepts: Measured = Field(None, description="share of unknown queries that pass the threshold")
    auroc: Measured = Field(None, description="of telling known classes from unknown ones by it")
    ece: Measured = Field(None, description="expected calibration error at this temperature")
    points: tuple[OperatingPoint, ...] = Field((), description="thresholds to choose from, from lenient to strict")


class Accuracy(_Part):
    """What to expect: mean accuracy over test episodes, with its 95 % interval."""

    ways: int
    shots: int
    queries: int
    episodes: int
    accuracy: float
    margin: float = Field(description="half the interval")

    def __str__(self) -> str:
        return (
            f"{100 * self.accuracy:.2f} ± {100 * self.margin:.2f} % "
            f"({self.ways}-way {self.shots}-shot, {self.episodes} episodes)"
        )


class Source(_Part):
    """Where a bundle comes from."""

    dataset: str = ""
    dataset_hash: str = ""
    commit: str = Field("", description="of git, with -dirty behind it if files had changed")
    run_id: str = Field("", description="MLflow's")
    recipe: str = ""


class TensorSpec(_Part):
    """One tensor of the state. W stands for the number of ways, S for the number of support images."""

    shape: tuple[int | Literal["S", "W"], ...]
    dtype: Literal["float32", "int64"] = "float32"


class Parity(_Part):
    """How the graphs compared with torch, before they were called a bundle. Differences are relative to the scale."""

    episodes: int
    accuracy: float = Field(description="of the graphs")
    torch_accuracy: float
    agreement: float = Field(
        description="share of queries that the graphs gave to the class that torch gave, or float64"
    )
    logit_difference: float = Field(description="largest absolute difference of two logits, over all the episodes")
    step_difference: float = Field(description="of the state after one step, to float64: median over episodes")
    torch_step_difference: float = Field(description="torch's own float32, compared in the same way")
    float64_difference: float = Field(description="of the logits after all steps, to float64: median over episodes")
    torch_float64_difference: float


class FileFacts(_Part):
    """The size and hash of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> Self:
        return cls(size=len(content), sha256=hashlib.sha256(content).hexdigest())


class Facts(_Part):
    """Facts about a learner that its graphs do not contain."""

    learner: Plugin
    backbone: Plugin
    image: ImageRule
    limits: Limits = Limits()
    calibration: tuple[Calibration, ...] = ()
    verification: Verification | None = None
    expected: tuple[Accuracy, ...] = ()
    source: Source = Source()


class Manifest(Facts):
    """bundle.json: everything that serving needs besides the graphs, and the origin of the bundle."""

    schema_version: Literal[3] = SCHEMA_VERSION
    norm: str
    transductive: Literal[False] = False
    takes: Literal["features", "images"] = Field(
        description="what adapting and classifying take: the features that embed.onnx makes of an image by itself, or "
        "images, where adapting changes what is made of them"
    )
    features: int = Field(ge=1, description="width of the features")
    steps: int | None = Field(None, description="default number of inner steps; none for a learner without inner steps")
    steps_by_shots: dict[int, int] = Field({}, description="the same for numbers of images of each class")
    state: dict[str, TensorSpec]
    parity: Parity
    files: dict[str, FileFacts]

    @model_validator(mode="after")
    def _names_its_files(self) -> Self:
        needed, extra = ({ADAPT, CLASSIFY, EMBED}, VIEWS) if self.takes == "features" else ({ADAPT, CLASSIFY}, EMBED)
        if not needed <= set(self.files) <= {*needed, extra}:
            expected, came = ", ".join(sorted(needed)), ", ".join(sorted(self.files)) or "none"
            raise ValueError(f"files must be {expected}, and may be {extra}; they are {came}")
        return self

    @classmethod
    def load(cls, source: str | Path) -> Manifest:
        """The manifest of a bundle, a folder or a zip, whose files have been checked against it."""
        return read(source)[0]

    def to_bytes(self) -> bytes:
        """bundle.json: the same manifest gives the same bytes."""
        return self.model_dump_json(indent=2).encode() + b"\n"

    @property
    def id(self) -> str:
        """Identifies exactly these graphs; a state carries it, so that states of other bundles are refused."""
        return hashlib.sha256("".join(self.files[name].sha256 for name in sorted(self.files)).encode()).hexdigest()[:16]

    def steps_for(self, shots: float) -> int | None:
        """Inner steps for so many images of each class, on average."""
        return None if self.steps is None else nearest_shots(self.steps_by_shots, shots, self.steps)

    def calibration_for(self, ways: int, shots: float) -> Calibration | None:
        """What holds for so many classes and images of each: of the nearest number of classes that was measured.

        Between two numbers of images it lies on a line in their inverse, as temperatures do; beyond them, and where the
        two measured different evidence, it is the nearest.
        """
        shots = max(1.0, shots)
        at: dict[int, Calibration] = {}
        for fit in sorted(self.calibration, key=lambda fit: -abs(math.log(fit.ways / max(1, ways)))):
            at[fit.shots] = fit  # the nearest comes last
        few = at.get(max((each for each in at if each <= shots), default=0))
        many = at.get(min((each for each in at if each >= shots), default=0))
        if few is None or many is None or few is many:
            return few or many
        way = (1 / few.shots - 1 / shots) / (1 / few.shots - 1 / many.shots)
        return _between(few, many, way) or (few if way < 0.5 else many)


def nearest_shots(steps: Mapping[int, int], shots: float, default: int) -> int:
    """The steps for the nearest number of shots in a table, by ratio; the default where it is empty."""
    nearest = min(steps, key=lambda known: (abs(math.log(known / max(1, shots))), known), default=None)
    return default if nearest is None else steps[nearest]


def _between(a: Calibration, b: Calibration, way: float) -> Calibration | None:
    """Part of the way from one calibration to another; None if they measured different things."""
    shares = [point.accepted for point in a.points]
    if a.by != b.by or shares != [point.accepted for point in b.points]:
        return None

    def mixed(one: _Part, other: _Part, *names: str) -> dict[str, float | None]:
        pairs = {name: (getattr(one, name), getattr(other, name)) for name in names}
        return {name: None if None in (x, y) else x + way * (y - x) for name, (x, y) in pairs.items()}

    points = tuple(
        one.model_copy(update=mixed(one, other, "threshold", "false_accepts"))
        for one, other in zip(a.points, b.points, strict=True)
    )
    figures = mixed(a, b, "temperature", "threshold", "accepted", "false_accepts")
    return a.model_copy(update={**figures, "points": points})


def read(source: str | Path) -> tuple[Manifest, dict[str, bytes]]:
    """A bundle's manifest and graphs, from a folder or a zip, each file read once and then checked.

    Refused: another schema, a file that is missing, a link, too large or changed, and graphs that keep weights
    in other files. A graph is read, or inflated, only if its size is the one that the manifest has for it.
    """
    source = Path(source)
    with _zip(source) if source.is_file() else _folder(source) as take:
        manifest = _parse(take(MANIFEST, None), source)
        contents = {name: take(name, facts.size) for name, facts in manifest.files.items()}
    for name, facts in manifest.files.items():
        found = FileFacts.of(contents[name])
        if found != facts:
            raise _changed(source, name, f"sha256 {found.sha256[:12]}…, not {facts.sha256[:12]}…")
        if elsewhere := external_tensor(contents[name]):
            raise BundleError(
                f"{source}: {name} keeps {elsewhere!r} in another file. The graphs of a bundle hold their weights."
            )
    return manifest, contents


def external_tensor(model: bytes) -> str | None:
    """The name of a tensor whose data lie outside an ONNX file, if there is one."""
    try:
        return next(external_tensors(memoryview(model)), None)
    except (IndexError, ValueError, RecursionError) as error:
        raise BundleError(f"not an ONNX file: {error}") from None


def _parse(content: bytes, source: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        faults = error.errors()
        if other := [fault["input"] for fault in faults if fault["loc"] == ("schema_version",)]:
            raise BundleError(
                f"{source}: {MANIFEST} has schema {other[0]!r}, and this kshot reads {SCHEMA_VERSION}. "
                "Export the model again, or install the kshot that wrote it."
            ) from None
        lines = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}" for fault in faults[:5])
        raise BundleError(f"{source}: {MANIFEST} is not valid: {lines}") from None


Take = Callable[[str, int | None], bytes]
"""The content of a file by its name, which has this size if one is given."""


def _changed(source: Path, name: str, how: str) -> BundleError:
    return BundleError(
        f"{source}: {name} is not the file that {MANIFEST} describes: {how}. Fetch or export the bundle again."
    )


@contextmanager
def _folder(folder: Path) -> Iterator[Take]:
    if not folder.is_dir():
        raise BundleError(f"there is no bundle at {folder}: expected a folder or a zip with {MANIFEST}")
    yield partial(_read_file, folder)


def _read_file(folder: Path, name: str, size: int | None) -> bytes:
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it lacks {name}") from None
    except OSError as error:
        why = "is a link, and a bundle holds its files itself" if path.is_symlink() else f"cannot be read: {error}"
        raise BundleError(f"{folder}: {name} {why}") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{folder}: {name} is not a file")
        _check_size(folder, name, status.st_size, size)
        return file.read()


@contextmanager
def _zip(path: Path) -> Iterator[Take]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries: dict[str, list[zipfile.ZipInfo]] = {}
            for entry in archive.infolist():
                _check_entry(path, entry)
                entries.setdefault(entry.filename, []).append(entry)

            def take(name: str, size: int | None) -> bytes:
                if len(found := entries.get(name, [])) != 1:
                    raise BundleError(f"{path} is not a bundle: it must hold {name} once, at its top")
                _check_size(path, name, found[0].file_size, size)
                return archive.read(found[0])

            yield take
    except KshotError:
        raise
    except Exception as error:  # zipfile, zlib and lzma each have errors of their own
        raise BundleError(f"{path} is not a readable zip: {error}") from None


def _check_entry(path: Path, entry: zipfile.ZipInfo) -> None:
    if entry.filename.startswith(("/", "\\")) or ".." in entry.filename.replace("\\", "/").split("/"):
        raise BundleError(f"{path}: {entry.filename!r} points outside the bundle")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise BundleError(f"{path}: {entry.filename!r} is a link, and a bundle holds its files itself")


def _check_size(source: Path, name: str, size: int, expected: int | None) -> None:
    if size > _LARGEST[name]:
        raise BundleError(f"{source}: {name} has {size:,} bytes; at most {_LARGEST[name]:,} are taken")
    if expected not in (None, size):
        raise _changed(source, name, f"it has {size:,} bytes, not {expected:,}")
