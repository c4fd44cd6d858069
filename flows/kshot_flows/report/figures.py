"""The committed figures, measured and published: the single source of all result tables.

`bench/record_figures.py` adds a finished run to `figures.json`, `bench/results_table.py` writes the tables of
docs/results.md from it, and `kshot algorithms NAME` shows a learner's part. Accuracies are in %.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

FILE = Path(__file__).with_name("figures.json")

MAY_LACK: Mapping[str, Mapping[str, float]] = {"omniglot": {"5w1s": 0.5, "5w5s": 0.5, "20w1s": 1.2}}
"""The pass marks: points that ours may lie under the published figure."""


class Figure(NamedTuple):
    """An accuracy in %, and half its 95 % interval if known."""

    accuracy: Annotated[float, Field(ge=0, le=100)]
    margin: Annotated[float, Field(ge=0)] | None = None

    def __str__(self) -> str:
        given = [number for number in self if number is not None]
        digits = max(len(str(number).partition(".")[2]) for number in given)
        return " ± ".join(f"{number:.{digits}f}" for number in given)


class Trust(NamedTuple):
    """Calibration and rejection of unknown classes at one episode size, in %, with thresholds from validation."""

    ece: float  # expected calibration error
    auroc: float | None  # AUROC of known against unknown queries
    false_accepts: float | None  # queries of unknown classes that pass
    accepted: float | None  # queries of known classes that pass, at the same threshold


Shape = Annotated[str, Field(pattern=r"^\d+w\d+s$")]
"""The size of an episode: `5w1s` is 5-way 1-shot."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(description="the learner's name, or that of a variant of it, such as 'fomaml'")
    data: str = Field(description="what it was trained and tested on: 'omniglot', 'omniglot to mnist'")


class Run(_Part):
    """One of our trainings, and its accuracies on test episodes."""

    learner: str
    command: str = Field(description="that gives these figures")
    trained: str = Field(description="how, in a few words")
    minutes: float | None = Field(None, ge=0, description="of meta-training")
    memory_gb: float | None = Field(None, ge=0, description="the largest resident set of the whole command")
    machine: str = Field("", description="where, if not where most were trained")
    recorded: str = Field("", description="the commit and the date at which it was measured")
    episodes: int = Field(ge=2)
    inductive: dict[Shape, Figure]
    transductive: dict[Shape, Figure] = Field({}, description="empty where queries share nothing: both are one figure")
    trust: dict[Shape, Trust] = Field({}, description="of calibration and unknown classes, where it was measured")

    @property
    def shapes(self) -> list[str]:
        """The episode sizes of its test, small ones first."""
        return sorted(self.inductive, key=_size)

    @property
    def time(self) -> str:
        """Duration of meta-training, and the machine."""
        return "" if self.minutes is None else ", ".join(filter(None, [f"{self.minutes:.0f} min", self.machine]))


class Published(_Part):
    """Figures of a paper, or of its code run by others."""

    source: str
    code: str | None = Field(None, description="whose code somebody ran again ('official'); None for a paper's figure")
    transductive: bool = False
    verified: bool = Field(True, description="whether anyone of us has read it, in the paper or quoted")
    figures: dict[Shape, Figure]

    def show(self, shape: str) -> str:
        """The figure with its marks: `t` transductive, `?` not checked against the paper, and whose code it was."""
        whose = f" ({self.code})" if self.code not in (None, "official") else ""
        return f"{self.figures[shape]}{' t' if self.transductive else ''}{'' if self.verified else ' ?'}{whose}"


class Figures(BaseModel):
    """All runs and published figures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: tuple[Run, ...]
    published: tuple[Published, ...]

    @property
    def data(self) -> list[str]:
        """The data sets that have tables."""
        return list(dict.fromkeys(run.data for run in self.runs))

    def rows(self, *, data: str | None = None, learner: str | None = None) -> Iterator[Row]:
        """A row for each run and episode size."""
        for run in self.runs:
            if data in (None, run.data) and learner in (None, run.learner):
                for shape in run.shapes:
                    yield Row(run, shape, self._find(run, shape, code=False), self._find(run, shape, code=True))

    def sources(self, data: str) -> list[Published]:
        """The published figures for these data."""
        return [entry for run in self.runs if run.data == data for entry in self.published if _same(entry, run)]

    def with_run(self, run: Run) -> Figures:
        """These figures with a run added, replacing the one that it repeats if there is one."""
        others = [known for known in self.runs if not _same(known, run)]
        places = [i for i, known in enumerate(self.runs) if _same(known, run)]
        last = max((i + 1 for i, known in enumerate(others) if known.data == run.data), default=len(others))
        others.insert(places[0] if places else last, run)
        return Figures(runs=tuple(others), published=self.published)

    def _find(self, run: Run, shape: str, *, code: bool) -> Published | None:
        entries = (entry for entry in self.published if _same(entry, run) and shape in entry.figures)
        return next((entry for entry in entries if (entry.code is not None) == code), None)


@dataclass(frozen=True)
class Row:
    """Our figure at one episode size, beside the published one."""

    run: Run
    shape: str
    paper: Published | None
    code: Published | None

    @property
    def ours(self) -> Figure:
        return self.run.inductive[self.shape]

    @property
    def transductive(self) -> Figure | None:
        return self.run.transductive.get(self.shape)

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's, in the same protocol if possible (transductive if both are)."""
        if self.paper is None:
            return None
        like = self.transductive if self.paper.transductive and self.transductive else self.ours
        return round(like.accuracy - self.paper.figures[self.shape].accuracy, 2)

    @property
    def passed(self) -> bool | None:
        """Whether the difference is within the pass mark; None without a mark or a difference."""
        mark = MAY_LACK.get(self.run.data, {}).get(self.shape)
        return None if mark is None or self.difference is None else self.difference >= -mark

    @property
    def verdict(self) -> str:
        """The difference, and whether it is within the pass mark, as text."""
        if self.difference is None:
            return ""
        mark = {True: " ✓", False: " ✗", None: ""}[self.passed]
        return f"{self.difference:+.2f}{mark}".replace("-", "−")


def load(file: Path = FILE) -> Figures:
    return Figures.model_validate_json(file.read_text())


def save(figures: Figures, file: Path = FILE) -> None:
    """Write the figures with one figure per line, for small diffs."""
    text = json.dumps(figures.model_dump(mode="json", exclude_defaults=True), indent=2, ensure_ascii=False)
    file.write_text(re.sub(r"\[\s*([\d.]+),\s*([\d.]+|null)\s*\]", r"[\1, \2]", text) + "\n")


def words(shape: str) -> str:
    """5w1s -> 5-way 1-shot"""
    ways, shots = _size(shape)
    return f"{ways}-way {shots}-shot"


def _size(shape: str) -> tuple[int, int]:
    ways, shots = re.findall(r"\d+", shape)
    return int(ways), int(shots)


def _same(one: _Part, other: _Part) -> bool:
    return (one.method, one.data) == (other.method, other.data)
