"""What an operator sees: Prometheus metrics by stage, and one JSON line for each request with its ids."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from random import getrandbits
from time import perf_counter
from typing import Any, Literal, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

Stage = Literal["decode", "queue", "infer", "adapt", "decide", "store"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_FLUSH_S = 0.1
_PIPE_BYTES = 4096
SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable by which workers share a folder of metrics: each tells those of all."""
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class Metrics:
    """The server's own registry of metrics: two servers in one process do not share numbers."""

    def __init__(self) -> None:
        self.registry = to = CollectorRegistry()
        self.stages = Histogram("kshot_stage_seconds", "time in one stage", ["stage"], buckets=_SECONDS, registry=to)
        self.requests = Counter("kshot_requests", "requests answered", ["route", "status"], registry=to)
        self.request_seconds = Histogram(
            "kshot_request_seconds", "whole requests", ["route"], buckets=_SECONDS, registry=to
        )
        self.refusals = Counter("kshot_refusals", "requests refused", ["code", "reason"], registry=to)
        self.dropped = Counter("kshot_dropped_images", "never run: client gone, or too late", ["why"], registry=to)
        self.batch = Histogram("kshot_batch_images", "images in one run", buckets=(1, 2, 4, 8, 16, 32, 64), registry=to)
        self.decisions = Counter("kshot_decisions", "answers by decision", ["decision"], registry=to)
        self.swaps = Counter("kshot_champion_swaps", "new champions, taken and refused", ["outcome"], registry=to)
        # Of a worker that has died, gauges tell nothing any more.
        self.queued = Gauge("kshot_queued_images", "images waiting now", registry=to, multiprocess_mode="livesum")
        self.ready = Gauge(
            "kshot_ready", "1 when a champion is loaded and warm", registry=to, multiprocess_mode="livemin"
        )
        self.degraded = Gauge(
            "kshot_degraded", "1 while what serves may not be what the registry names", registry=to,
            multiprocess_mode="livemax",
        )  # fmt: skip
        self.champion = Gauge(
            "kshot_champion", "1 for the model that serves, 0 for those before it", ["name", "version", "bundle"],
            registry=to, multiprocess_mode="livemax",
        )  # fmt: skip
        self.spaces = Gauge("kshot_label_spaces", "label spaces", registry=to, multiprocess_mode="livemostrecent")
        self.state_bytes = Gauge(
            "kshot_state_bytes", "adapted states in memory", registry=to, multiprocess_mode="livesum"
        )

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Time a block, for the metrics and for the request's own log line."""
        started = perf_counter()
        try:
            yield
        finally:
            self.took(stage, perf_counter() - started)

    def took(self, stage: Stage, seconds: float) -> None:
        self.stages.labels(stage).observe(seconds)
        if (request := current.get()) is not None:
            request.stages[stage] = request.stages.get(stage, 0.0) + seconds

    def exposition(self) -> bytes:
        """The Prometheus text format; of all workers, where there are several."""
        registry = self.registry
        if SHARED in os.environ:
            multiprocess.MultiProcessCollector(registry := CollectorRegistry())
        return generate_latest(registry)


def forget(pid: int, folder: Path) -> None:
    """Leave a worker that has died out of the gauges."""
    multiprocess.mark_process_dead(pid, str(folder))


@dataclass
class Request:
    """What goes into the log line of one request. Its ids tell requests apart, and need not be hard to guess."""

    id: str
    trace: str
    started: float = field(default_factory=perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, traceparent: str | None) -> Request:
        """A new request, in the caller's trace if it names one (W3C Trace Context)."""
        found = _TRACEPARENT.fullmatch(traceparent or "")
        return cls(f"req_{getrandbits(80):020x}", found[1] if found else f"{getrandbits(128) or 1:032x}")

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace}-{getrandbits(64) or 1:016x}-01"


current: ContextVar[Request | None] = ContextVar("request", default=None)
"""The request that this task answers."""


class JsonLines(logging.Formatter):
    """A log record as one JSON object: time, level, message, the request's ids, and the record's own `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request := current.get()) is not None:
            line |= {"request_id": request.id, "trace_id": request.trace}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Lines(logging.Formatter):
    """The same for a person at a terminal: one line, and the fields behind the message."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in getattr(record, "fields", {}).items())
        line = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():7} {record.getMessage()} {fields}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line.rstrip()


class _Buffered(logging.Handler):
    """Writes lines a few times a second, and a warning at once: a write for each would hold up every request.

    A write is of whole lines, of no more bytes than a pipe takes at once: those of several workers do not mix.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._file = open(os.dup(stream.fileno()), "wb", buffering=0)  # noqa: SIM115
        self._lines: list[bytes] = []
        self._wrote = threading.Event()
        threading.Thread(target=self._flushing, name="kshot-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(f"{self.format(record)}\n".encode())
            if record.levelno >= logging.WARNING:
                self.flush()
        except Exception:  # a log that nobody takes any more fails no request
            self.handleError(record)
        self._wrote.set()

    def flush(self) -> None:
        self.acquire()
        try:
            lines, self._lines = self._lines, []
            for block in _blocks(lines):
                while block:
                    block = block[self._file.write(block) :]
        finally:
            self.release()

    def _flushing(self) -> None:
        while self._wrote.wait():
            time.sleep(_FLUSH_S)
            self._wrote.clear()
            with suppress(OSError):
                self.flush()


def _blocks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines together, as many as a pipe takes without parting them (PIPE_BUF); a longer line by itself."""
    block = b""
    for line in lines:
        if block and len(block) + len(line) > _PIPE_BYTES:
            yield block
            block = b""
        block += line
    if block:
        yield block


def configure_logs(stream: TextIO) -> None:
    """All logs of this process on one stream: lines for a person if one looks on, else JSON."""
    handler = logging.StreamHandler(stream) if stream.isatty() else _Buffered(stream)
    handler.setFormatter(Lines() if stream.isatty() else JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)  # Pillow has some for damaged photos, and every line is to be JSON
    for noisy in ("uvicorn", "uvicorn.error", "python_multipart", "alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
