"""A comparison of recipes: accuracies on the same episodes, paired differences, and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kshot.data.episodes import Shape
from kshot.evaluation.open_set import OpenSet
from kshot.evaluation.statistics import interval

Verdict = Literal["better", "worse", "no difference"]


@dataclass(frozen=True)
class Draw:
    """Episode size and protocol."""

    shape: Shape
    protocol: str = "random photos"


@dataclass(frozen=True)
class Measured:
    """One recipe's accuracy on some episodes, its paired difference to another recipe, and its calibration.

    The last two are of all episodes that the recipe asks for.
    """

    accuracy: float
    margin: float  # half the 95 % interval, as below
    difference: float
    difference_margin: float
    ece: float
    open_set: OpenSet | None

    @classmethod
    def of(cls, accuracies: np.ndarray, reference: np.ndarray, ece: float, open_set: OpenSet | None) -> Measured:
        """From per-episode accuracies (episodes,), in the same order for both recipes."""
        return cls(*interval(accuracies), *interval(accuracies - reference), ece, open_set)

    @property
    def verdict(self) -> Verdict:
        """The difference in words: "no difference" if its interval contains zero."""
        if abs(self.difference) <= self.difference_margin:
            return "no difference"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Cost:
    """The costs of a bundle."""

    adapt_ms: float  # to adapt to one episode's support set
    classify_ms: float  # to classify one photo
    parameters: int  # that serving needs
    bundle_bytes: int


@dataclass(frozen=True)
class Standing:
    """One recipe's row."""

    label: str
    learner: str
    measured: dict[Draw, Measured]
    cost: Cost


@dataclass(frozen=True)
class Standings:
    """All rows; differences are relative to the first."""

    data: str
    episodes: dict[Draw, int]  # number of shared episodes of each kind
    rows: tuple[Standing, ...]
    rounds: int  # rounds of timing

    @property
    def draws(self) -> list[Draw]:
        return list(self.episodes)

    def label(self, draw: Draw) -> str:
        """Episodes in words, with the protocol unless all use random photos."""
        named = any(each.protocol != "random photos" for each in self.draws)
        return f"{draw.shape.ways}-way {draw.shape.shots}-shot" + (f", {draw.protocol}" if named else "")

    @property
    def reference(self) -> Standing:
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        """The table as a JSON object."""
        rows = []
        for row in self.rows:
            episodes = [
                {
                    **asdict(draw.shape), "protocol": draw.protocol, "count": self.episodes[draw],
                    **asdict(measured), "verdict": measured.verdict,
                }
                for draw, measured in row.measured.items()
            ]  # fmt: skip
            rows.append({"recipe": row.label, "learner": row.learner, **asdict(row.cost), "episodes": episodes})
        return {
            "data": self.data,
            "reference": self.reference.label,
            "adapted_to": asdict(self.draws[0].shape),
            "rounds": self.rounds,
            "rows": rows,
        }


@dataclass(frozen=True)
class Comparison:
    """The result, its folder and its MLflow run."""

    standings: Standings
    folder: Path
    run: str  # MLflow's


def shared(shapes: Sequence[Sequence[Shape]]) -> list[Shape]:
    """The shapes that occur in all lists, in the order of the first."""
    return [shape for shape in shapes[0] if all(shape in others for others in shapes[1:])]
