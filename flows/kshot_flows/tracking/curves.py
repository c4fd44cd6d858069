"""The learning curve of a training as a file of lines, which grows while it runs and survives its being killed."""

from __future__ import annotations

import json
from pathlib import Path

from kshot.training import Progress

_POINTS = 500  # in a curve, about, beside the validated steps

Point = dict[str, float]


class Curve:
    """Mean losses over stretches of outer steps, and the validations between them."""

    def __init__(self, file: Path, steps: int, position: int) -> None:
        """Go on at `position`: what an earlier process wrote past its last checkpoint happens again, and is dropped."""
        self.every = max(1, steps // _POINTS)
        self.file = file
        self._losses: list[float] = []
        self.points = [point for point in read(file) if point["step"] <= position]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(point) + "\n" for point in self.points))

    def add(self, progress: Progress) -> Point | None:
        """Take in an outer step; the point that it completes, if it does."""
        self._losses.append(progress.loss)
        if progress.validation is None and progress.step % self.every:
            return None
        point: Point = {"step": progress.step, "loss": sum(self._losses) / len(self._losses), "lr": progress.lr}
        if progress.validation is not None and progress.margin is not None:
            point |= {"validation": progress.validation, "margin": progress.margin}
        self._losses.clear()
        self.points.append(point)
        with self.file.open("a") as file:
            file.write(json.dumps(point) + "\n")
        return point


def read(file: Path) -> list[Point]:
    """The points of a curve, without a last line that was cut off."""
    if not file.exists():
        return []
    lines = file.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def metrics(point: Point) -> dict[str, float]:
    """A point under the names of MLflow's metrics."""
    names = {"loss": "train.loss", "lr": "train.lr", "validation": "validation.accuracy", "margin": "validation.margin"}
    return {names[key]: value for key, value in point.items() if key in names}
