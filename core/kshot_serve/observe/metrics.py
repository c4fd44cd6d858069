"""Prometheus metrics of a server, and the time that each stage of a request takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    multiprocess,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kshot_serve.observe.trace import current

Stage = Literal["decode", "queue", "infer", "adapt", "decide", "store"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable by which workers share a folder of metrics: each tells those of all."""

disable_created_metrics()  # no `_created` series: a seventh of all lines, which nobody asks for


class Metrics:
    """The server's own registry of metrics: two servers in one process do not share numbers."""

    def __init__(self) -> None:
        self.registry = to = CollectorRegistry()
        ProcessCollector(registry=to)
        self.stages = Histogram("kshot_stage_seconds", "time in one stage", ["stage"], buckets=_SECONDS, registry=to)
        self.requests = Counter("kshot_requests", "requests answered", ["route", "status"], registry=to)
        self.request_seconds = Histogram(
            "kshot_request_seconds", "whole requests", ["route"], buckets=_SECONDS, registry=to
        )
        self.refusals = Counter("kshot_refusals", "requests refused", ["code", "reason"], registry=to)
        self.dropped = Counter("kshot_dropped_images", "never run: client gone, or too late", ["why"], registry=to)
        self.batch = Histogram("kshot_batch_images", "images in one run", buckets=(1, 2, 4, 8, 16, 32, 64), registry=to)
        self.decisions = Counter("kshot_decisions", "answers by decision", ["decision"], registry=to)
        self.swaps = Counter(
            "kshot_champion_swaps", "new champions, taken and refused", ["outcome", "reason"], registry=to
        )
        self.cut = Counter("kshot_connections_cut", "connections that the server closed", ["why"], registry=to)
        # Of a worker that has died, gauges tell nothing any more.
        self.connections = Gauge("kshot_connections", "open now", registry=to, multiprocess_mode="livesum")
        self.queued = Gauge("kshot_queued_images", "images waiting now", registry=to, multiprocess_mode="livesum")
        self.ready = Gauge(
            "kshot_ready", "1 when a champion is loaded and warm", registry=to, multiprocess_mode="livemin"
        )
        self.degraded = Gauge(
            "kshot_degraded", "1 while what serves may not be what the registry names", registry=to,
            multiprocess_mode="livemax",
        )  # fmt: skip
        self.candidate_since = Gauge(
            "kshot_candidate_start_time_seconds", "when a new version that is being tried was begun with; 0: none is",
            registry=to, multiprocess_mode="livemax",
        )  # fmt: skip
        self.champion = Gauge(
            "kshot_champion", "1 for the model that serves, 0 for those before it", ["name", "version", "bundle"],
            registry=to, multiprocess_mode="livemax",
        )  # fmt: skip
        self.spaces = Gauge("kshot_label_spaces", "label spaces", registry=to, multiprocess_mode="livemostrecent")
        self.state_bytes = Gauge(
            "kshot_state_bytes", "adapted states in memory", registry=to, multiprocess_mode="livesum"
        )
        self.database_away = Gauge(
            "kshot_database_away", "1 while the database does not answer", registry=to, multiprocess_mode="livemax"
        )
        self.storage_full = Gauge(
            "kshot_storage_full", "1 since a write found the disk full", registry=to, multiprocess_mode="livemax"
        )
        self.unscrubbed = Gauge(
            "kshot_unscrubbed_deletions", "whose bytes, or photo keys, may still be in SQLite's files",
            registry=to, multiprocess_mode="livesum",
        )  # fmt: skip

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
            request.took(stage, seconds)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics of all workers, and their media type: OpenMetrics or Prometheus' text, by an Accept header."""
        registry = self.registry
        if SHARED in os.environ:
            multiprocess.MultiProcessCollector(registry := CollectorRegistry())
            registry.register(_Processes(Path(os.environ[SHARED])))
        encoder, kind = choose_encoder(accept)
        return encoder(registry), kind


class _Processes(Collector):
    """The `process_*` metrics of all workers together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        found: dict[str, list[Metric]] = {}
        for pid in {int(path.stem.rsplit("_", 1)[1]) for path in self._folder.glob("gauge_live*.db")}:
            for metric in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                found.setdefault(metric.name, []).append(metric)
        for name, (first, *others) in found.items():
            together = min if name in ("process_max_fds", "process_start_time_seconds") else sum
            values = [metric.samples[0].value for metric in (first, *others)]
            first.samples = [first.samples[0]._replace(value=together(values))]
            yield first


def forget(pid: int, folder: Path) -> None:
    """Leave a worker that has died out of the gauges."""
    multiprocess.mark_process_dead(pid, str(folder))
