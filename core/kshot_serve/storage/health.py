"""What the database has lately been like: whether it answers, whether its disk is full, what is yet to be scrubbed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Literal

from kshot_serve.errors import Problem
from kshot_serve.observe.metrics import Metrics

_SILENT_S = 2.0  # a probe without an answer for so long means that the database is away


class Health:
    """Learns from every transaction, and from a probe each second. Attributes may be read from any thread."""

    def __init__(self, metrics: Metrics, stale_s: float) -> None:
        self._metrics = metrics
        self._stale_s = stale_s
        self._away_since: float | None = None
        self._probed: float | None = None  # when the probe that has no answer yet was sent
        self.full = False
        self.keys_away = False  # the photo keys' database does not answer
        self.unscrubbed = 0  # deletions whose bytes, or photo keys, may still be in SQLite's files

    @property
    def away_s(self) -> float:
        """For how many seconds the database has not answered; 0 if it does."""
        since, probed = self._away_since, self._probed
        if since is None and probed is not None and monotonic() - probed > _SILENT_S:
            since = probed
        return 0.0 if since is None else max(monotonic() - since, 1e-9)

    @property
    def status(self) -> Literal["ok", "full", "away"]:
        """`away`: the database does not answer. `full`: its disk takes no more, but reading and deleting go on."""
        return "away" if self.away_s else "full" if self.full else "ok"

    @property
    def troubles(self) -> list[str]:
        """What is wrong, for people."""
        away = ["the database does not answer"] if self.away_s else []
        away += ["the photo keys' database does not answer"] if self.keys_away else []
        return [*away, "the disk is full: only deletions are written"] if self.full else away

    @property
    def bridged(self) -> bool:
        """Whether answers may be given from what was last read: always, but when the database is away for long."""
        return self.away_s < self._stale_s

    @contextmanager
    def watched(self, writes: bool = False) -> Iterator[None]:
        """Learn from what a transaction, which raises nothing of the database's own but Problems, comes to."""
        try:
            yield
        except Problem as problem:
            if (problem.code, problem.reason) == ("not_ready", "database"):
                self._away_since = self._away_since or monotonic()
            else:
                self._away_since = None
                self.full = self.full or problem.code == "storage_full"
            self.tell()
            raise
        self._away_since = None
        self.full = self.full and not writes
        self.tell()

    @contextmanager
    def watched_keys(self) -> Iterator[None]:
        """Learn from what a transaction on the photo keys comes to."""
        try:
            yield
            self.keys_away = False
        except Problem as problem:
            self.keys_away = problem.code == "not_ready"
            raise
        finally:
            self.tell()

    @contextmanager
    def probing(self) -> Iterator[None]:
        self._probed = monotonic()
        try:
            yield
        finally:
            self._probed = None

    def tell(self) -> None:
        """Bring the gauges up to date."""
        self._metrics.database_away.set(bool(self.away_s) or self.keys_away)
        self._metrics.storage_full.set(self.full)
        self._metrics.unscrubbed.set(self.unscrubbed)
