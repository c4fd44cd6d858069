"""Profiles of a run: time and memory of each step and stage, and traces of torch's operations."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import astuple, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.markup import escape

from kshot_flows.console.tables import numbers, table

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")

FOLDER = "profile"  # beside the learner
_WARM_UP, _STEPS = 2, 5  # training steps before the trace, and in it
_OPERATIONS = 25  # in a list of operations
_SHORT = 0.05  # seconds of a stage that no table shows


@dataclass
class Measured:
    """The time and memory of a step, or of a stage within one."""

    what: str
    depth: int
    wall: float  # seconds
    cpu: float  # seconds of all threads
    peak: int  # bytes resident, at most


@dataclass
class Profile:
    """Measurements, ordered by start."""

    measured: list[Measured] = field(default_factory=list)
    _open: list[Measured] = field(default_factory=list, repr=False)

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        self._note_peak()
        this = Measured(what, len(self._open), time.perf_counter(), time.process_time(), 0)
        self.measured.append(this)
        self._open.append(this)
        try:
            yield
        finally:
            self._note_peak()
            self._open.pop()
            this.wall, this.cpu = time.perf_counter() - this.wall, time.process_time() - this.cpu

    def table(self) -> Table:
        """All steps, and the longer stages."""
        listed = table("where the time went", "wall s", "CPU s", "peak MB")
        numbers(listed, 3)
        for one in self.measured:
            if one.depth == 0 or one.wall > _SHORT:
                name = escape("  " * one.depth + one.what)
                listed.add_row(name, f"{one.wall:.2f}", f"{one.cpu:.2f}", f"{one.peak / 1e6:.0f}")
        return listed

    def write(self, folder: Path) -> None:
        """Write the table as CSV beside the traces."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "steps.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([each.name for each in fields(Measured)])
            writer.writerows(astuple(one) for one in self.measured)

    def _note_peak(self) -> None:
        """Record the peak since the last call for all open measurements, and reset it."""
        peak = _peak()
        for one in self._open:
            one.peak = max(one.peak, peak)


_profile: ContextVar[Profile | None] = ContextVar("profile", default=None)


@contextmanager
def profiled() -> Iterator[Profile]:
    """Profile the block."""
    token = _profile.set(found := Profile())
    try:
        yield found
    finally:
        _profile.reset(token)


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Measure a step or stage, if this run is profiled."""
    if profile := _profile.get():
        with profile.measure(what):
            yield
    else:
        yield


def steps(every: Iterator[T], folder: Path) -> Iterator[T]:
    """Iterate over outer steps; trace some of them if this run is profiled."""
    if _profile.get():
        yield from islice(every, _WARM_UP)
        with traced("training", folder):
            yield from islice(every, _STEPS)
    yield from every


def active() -> bool:
    """Whether this run is profiled."""
    return _profile.get() is not None


@contextmanager
def traced(what: str, folder: Path) -> Iterator[None]:
    """Trace torch's operations to `WHAT.json.gz` (chrome://tracing, Perfetto), and list the longest in `WHAT.txt`."""
    from torch import cuda
    from torch.profiler import ProfilerActivity, profile

    devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda.is_available() else [])]
    with profile(activities=devices, record_shapes=True, profile_memory=True) as found:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(folder / f"{what}.json.gz"))
    by = f"self_{'device' if cuda.is_available() else 'cpu'}_time_total"
    (folder / f"{what}.txt").write_text(found.key_averages().table(sort_by=by, row_limit=_OPERATIONS))


def _peak() -> int:
    """Peak resident bytes since the last call; since the start, or now, on systems other than Linux."""
    with suppress(OSError, StopIteration):  # on Linux
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")
        return peak
    import psutil

    now = psutil.Process().memory_info()
    return int(getattr(now, "peak_wset", now.rss))
