"""Learning curves as JSON-lines files that grow during training and survive a kill, and their upload to MLflow."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.markup import escape

from kshot.training import Progress
from kshot_flows import project
from kshot_flows.console.progress import say
from kshot_flows.tracking import stores
from kshot_flows.tracking.runs import Run

_POINTS = 500  # approximate number of points in a curve, besides validations
_AT_ONCE = 200  # points per call
_SECONDS = 2.0  # seconds between two calls
_PATIENCE = 10.0  # seconds without an answer before it is reported

Point = dict[str, float]


class Curve:
    """Mean losses over intervals of outer steps, and validation accuracies."""

    def __init__(self, file: Path, steps: int, position: int) -> None:
        """Resume at `position`; points that an earlier process wrote after its last checkpoint are dropped."""
        self.every = max(1, steps // _POINTS)
        self.file = file
        self._losses: list[float] = []
        self.points = [point for point in read(file) if point["step"] <= position]
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(point) + "\n" for point in self.points))
        unfinished.replace(file)

    def add(self, progress: Progress) -> Point | None:
        """Add an outer step; returns the point that it completes, if any."""
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
    """The points of a curve; truncated or damaged lines are skipped."""
    found = []
    for line in file.read_text(errors="replace").split("\n") if file.exists() else ():
        with suppress(ValueError):
            point = json.loads(line)
            if isinstance(point, dict) and "step" in point:
                found.append(point)
    return found


def metrics(point: Point) -> dict[str, float]:
    """A point as MLflow metrics."""
    names = {"loss": "train.loss", "lr": "train.lr", "validation": "validation.accuracy", "margin": "validation.margin"}
    return {names[key]: value for key, value in point.items() if key in names}


def send_missing(run: Run, points: Sequence[Point]) -> None:
    """Send the points that an MLflow run lacks."""
    had = run.steps("train.loss")
    run.send([(int(point["step"]), metrics(point)) for point in points if point["step"] not in had])


@contextmanager
def sending(run: Run, curve: Curve) -> Iterator[Callable[[Point | None], None]]:
    """A callback that sends points of a curve to its MLflow run without being able to end or stall the training.

    Points that could not be sent are retried, for some seconds at the end, and by `send_missing` in a later step.
    """
    sender = _Sender(run, curve)
    try:
        yield sender.take
    finally:
        sender.close()


class _Sender:
    """Sends points in a background thread."""

    def __init__(self, run: Run, curve: Curve) -> None:
        self._run, self._had = run, run.steps("train.loss")
        self._where = f"MLflow at {stores.public(run.client.tracking_uri)}"
        self._file = curve.file.relative_to(project.home())
        self._waiting: list[tuple[int, Mapping[str, float]]] = []
        self._taken, self._away, self._reason = time.monotonic(), False, ""
        self._ending, self._given_up = threading.Event(), False
        for point in curve.points:
            self.take(point)
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def take(self, point: Point | None) -> None:
        """Queue a point, if there is one; report once if nothing could be sent for ten seconds."""
        if point is not None and point["step"] not in self._had:
            if not self._waiting:
                self._taken = time.monotonic()
            self._waiting.append((int(point["step"]), metrics(point)))
        away = bool(self._waiting) and time.monotonic() - self._taken > _PATIENCE
        if away and not self._away:
            self._say(f"does not answer{self._reason}; metrics are kept in {self._file} and sent when it does")
        elif self._away and not away:
            self._say("answers again, and has the metrics")
        self._away = away

    def close(self) -> None:
        """Send queued points, for at most some seconds."""
        self._ending.set()
        self._thread.join(1 if self._away else _PATIENCE)
        if self._waiting:
            self._given_up = self._run.away = True
            self._say(f"does not have all metrics{self._reason}; they are in {self._file}, and sent by the next run")

    def _work(self) -> None:
        while not (self._ending.wait(_SECONDS) and (self._given_up or not self._waiting)):
            if batch := self._waiting[:_AT_ONCE]:
                try:
                    self._run.send(batch)
                except Exception as error:  # no error may end a training
                    self._reason = f" ({stores.reason(error)})"
                    time.sleep(_SECONDS / 4)
                else:
                    del self._waiting[: len(batch)]
                    self._taken = time.monotonic()

    def _say(self, what: str) -> None:
        say(escape(f"  {self._where} {what}"))
