"""Progress output of running steps: a bar in a terminal, occasional lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from kshot import malloc
from kshot.data.importing import Progress as ImportProgress
from kshot.training import Progress as Position
from kshot_flows.console import profiling
from kshot_flows.console.tables import console

_SECONDS = 30.0  # minimum time between lines in a log, except after a validation


def say(text: str) -> None:
    """Print a line to standard output, and log it to the current Prefect run."""
    if not _logged(text):
        console().print(text)


def _logged(text: str) -> bool:
    """Log a line to the current Prefect run, if any; returns whether Prefect also prints it."""
    if "prefect" not in sys.modules:
        return False
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger
    from prefect.logging.handlers import PrefectConsoleHandler

    with suppress(MissingContextError):
        get_run_logger().info(Text.from_markup(text).plain)
        printing = [one for one in logging.getLogger().handlers if isinstance(one, PrefectConsoleHandler)]
        return any(handler.level <= logging.INFO for handler in printing)
    return False


def training(positions: Iterator[Position]) -> Iterator[Position]:
    """Iterate over training progress, and show it."""
    out = console()
    with profiling.measured("outer steps, with validation"):
        yield from _bar(positions, out) if out.is_terminal else _lines(positions)


@contextmanager
def counting(what: str) -> Iterator[Callable[[ImportProgress], None]]:
    """A callback that shows progress; nothing is shown before its first call."""
    out = console()
    if not out.is_terminal:
        with profiling.measured(what):
            yield _counted(what)
        return
    columns = (SpinnerColumn(), TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with profiling.measured(what), Progress(*columns, console=out, transient=True) as bar:
        row = bar.add_task("", total=None, visible=False)
        yield lambda at: bar.update(row, completed=at.done, total=at.total, visible=True)


def _counted(what: str) -> Callable[[ImportProgress], None]:
    told = 0.0

    def tell(at: ImportProgress) -> None:
        nonlocal told
        if time.monotonic() - told > _SECONDS or at.done == at.total:
            told = time.monotonic()
            say(f"  {what}: {at.done:,} of {at.total:,}")

    return tell


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Show that work of unknown length is in progress."""
    out = console()
    with profiling.measured(what):
        if out.is_terminal:
            _logged(what)
            with out.status(what):
                yield
        else:
            say(f"  {what}")
            yield


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Show a long stage, and keep freed memory in the process until its end (`kshot.malloc`)."""
    with busy(what), malloc.kept():
        yield


def _bar(positions: Iterator[Position], out: Console) -> Iterator[Position]:
    columns = (
        SpinnerColumn(), TextColumn("meta-training"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=out, transient=True) as bar:
        row = bar.add_task("", figures="", total=None)
        loss, validation = None, ""
        for position in positions:
            loss = position.loss if loss is None else 0.95 * loss + 0.05 * position.loss
            if position.validation is not None:
                validation = f"  validation {_percent(position)}"
                _logged(_line(position))
            bar.update(
                row, completed=position.step, total=position.steps, figures=f"loss {loss:.3f}{validation}"
            )  # fmt: skip
            yield position


def _lines(positions: Iterator[Position]) -> Iterator[Position]:
    first, last, began = None, time.monotonic(), time.monotonic()
    for position in positions:
        now = time.monotonic()
        if first is None:
            first = position.step - 1
        if position.validation is not None or now - last > _SECONDS:
            last = now
            seconds = (now - began) * (position.steps - position.step) / (position.step - first)
            left = f"  {_clock(seconds)} left" if position.step < position.steps else ""
            say(_line(position) + left)
        yield position


def _line(position: Position) -> str:
    found = f"  validation {_percent(position)}" if position.validation is not None else ""
    return f"  step {position.step}/{position.steps}  loss {position.loss:.3f}{found}"


def _percent(position: Position) -> str:
    return f"{100 * (position.validation or 0):.2f} ± {100 * (position.margin or 0):.2f} %"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
