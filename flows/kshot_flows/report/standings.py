"""How recipes stand to each other: accuracies on the same episodes, their paired differences, and what each costs."""

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
    """How episodes are drawn: their size, and by which protocol."""

    shape: Shape
    protocol: str = "random photos"


@dataclass(frozen=True)
class Measured:
    """One recipe's accuracy on some episodes, how far it is from another's on the very same ones, and its calibration.

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
        """From the accuracy of every episode: (episodes,), in the same order for both."""
        return cls(*interval(accuracies), *interval(accuracies - reference), ece, open_set)

    @property
    def verdict(self) -> Verdict:
        """In words: where the interval of the difference holds zero, the episodes show none."""
        if abs(self.difference) <= self.difference_margin:
            return "no difference"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Cost:
    """What using a bundle takes."""

    adapt_ms: float  # adapting to one episode's support set
    classify_ms: float  # classifying one photo
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
    """All of them; differences are to the first."""

    data: str
    episodes: dict[Draw, int]  # of each kind that all recipes share: how many all of them played
    rows: tuple[Standing, ...]
    rounds: int  # over which times were taken

    @property
    def draws(self) -> list[Draw]:
        return list(self.episodes)

    def label(self, draw: Draw) -> str:
        """Episodes in words, which name the protocol unless all are of random photos."""
        named = any(each.protocol != "random photos" for each in self.draws)
        return f"{draw.shape.ways}-way {draw.shape.shots}-shot" + (f", {draw.protocol}" if named else "")

    @property
    def reference(self) -> Standing:
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        """The table, as JSON has it."""
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
    """The result, and where it was put."""

    standings: Standings
    folder: Path
    run: str  # MLflow's


def shared(shapes: Sequence[Sequence[Shape]]) -> list[Shape]:
    """The shapes that occur in all lists, in the order of the first."""
    return [shape for shape in shapes[0] if all(shape in others for others in shapes[1:])]
