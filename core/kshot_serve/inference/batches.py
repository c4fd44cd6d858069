"""Batches: rows of many calls that share one run of onnxruntime."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TypeVar

import numpy as np

from kshot_serve.errors import Problem

log = logging.getLogger(__name__)
T = TypeVar("T")
Outputs = tuple[np.ndarray, ...]
Run = Callable[[np.ndarray], Outputs]


@dataclass(eq=False)
class Call:
    """Rows that one caller waits for; they may go to the model in several runs."""

    rows: np.ndarray
    deadline: float
    answer: asyncio.Future[Outputs]
    caller: str = ""
    since: float = field(default_factory=monotonic)
    started: float = 0.0  # when its first run began
    taken: int = 0  # rows that have gone to a run
    known: int = 0  # rows whose results are here
    results: Outputs = ()

    def take(self, piece: Piece, outcome: Outputs | Problem) -> None:
        """Results of some rows, or why there are none."""
        if self.answer.done():
            return
        if isinstance(outcome, Problem):
            self.answer.set_exception(outcome)
            return
        if not self.results:
            self.results = tuple(np.empty((len(self.rows), *part.shape[1:]), part.dtype) for part in outcome)
        for result, part in zip(self.results, outcome, strict=True):
            result[piece.start : piece.stop] = part
        self.known += piece.stop - piece.start
        if self.known == len(self.rows):
            self.answer.set_result(self.results)


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a call, as they go to one run."""

    call: Call
    start: int
    stop: int

    @property
    def rows(self) -> np.ndarray:
        return self.call.rows[self.start : self.stop]


@dataclass(eq=False)
class Group:
    """Calls whose rows may share a run: of each caller the oldest first, and callers in turn."""

    run: Run
    _turns: dict[str, deque[Call]] = field(default_factory=dict)

    @property
    def calls(self) -> list[Call]:
        return [call for calls in self._turns.values() for call in calls]

    @property
    def rows(self) -> int:
        return sum(len(call.rows) - call.taken for call in self.calls)

    def append(self, call: Call) -> None:
        self._turns.setdefault(call.caller, deque()).append(call)

    def remove(self, call: Call) -> None:
        self._turns[call.caller].remove(call)
        if not self._turns[call.caller]:
            del self._turns[call.caller]

    def cut(self, size: int, now: float) -> Batch:
        """The next batch of at most so many rows, as many of each caller as there are."""
        pieces = []
        room = size
        while room and self._turns:
            caller, calls = next(iter(self._turns.items()))
            call, share = calls[0], max(1, room // len(self._turns))
            start, call.taken = call.taken, min(len(call.rows), call.taken + share)
            call.started = call.started or now
            pieces.append(Piece(call, start, call.taken))
            room -= call.taken - start
            del self._turns[caller]
            if call.taken == len(call.rows):
                calls.popleft()
            if calls:
                self._turns[caller] = calls
        return Batch(self.run, pieces, size, size - room, now)


@dataclass(frozen=True, eq=False)
class Batch:
    """What goes to the model at once: pieces of many calls, padded to a size that has been warmed."""

    inference: Run
    pieces: Sequence[Piece]
    size: int
    rows: int
    started: float

    def run(self) -> list[Outputs | Problem]:
        """The results of each piece. Runs in a thread."""
        try:
            first = self.pieces[0].rows
            batch = first
            if len(first) != self.size:
                batch = np.zeros((self.size, *first.shape[1:]), first.dtype)
                np.concatenate([piece.rows for piece in self.pieces], out=batch[: self.rows])
            outputs = self.inference(batch)
        except Exception as error:
            if self.rows > 1:
                log.warning("a run of %d images failed; each runs by itself now: %s", self.rows, error)
            return [self._by_itself(piece) for piece in self.pieces]
        ends = np.cumsum([len(piece.rows) for piece in self.pieces])
        return [
            tuple(output[end - len(piece.rows) : end] for output in outputs)
            for piece, end in zip(self.pieces, ends.tolist(), strict=True)
        ]

    def _by_itself(self, piece: Piece) -> Outputs | Problem:
        try:
            parts = [self.inference(piece.rows[i : i + 1]) for i in range(len(piece.rows))]
        except Exception:
            log.exception("the model fails on an image")
            return Problem("internal", "the model fails on this image")
        return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))
