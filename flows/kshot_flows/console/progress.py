"""How a running step looks to a person: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from kshot import memory
from kshot.importing import Progress as ImportProgress
from kshot.training import Progress as Position

_SECONDS = 30.0  # between lines in a log, at least, where nothing was validated


def console() -> Console:
    """Standard output, as it is now."""
    return Console(highlight=False)


def say(text: str) -> None:
    """One line for people."""
    console().print(text)


def training(positions: Iterator[Position]) -> Iterator[Position]:
    """Pass on where training stands, and show it."""
    out = console()
    return _bar(positions, out) if out.is_terminal else _lines(positions)


@contextmanager
def counting(what: str) -> Iterator[Callable[[ImportProgress], None]]:
    """A function to tell how far something is; nothing is shown before it is first told."""
    out = console()
    if not out.is_terminal:
        yield _counted(what)
        return
    columns = (SpinnerColumn(), TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bar:
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
    """Show that something of unknown length goes on."""
    out = console()
    if out.is_terminal:
        with out.status(what):
            yield
    else:
        out.print(f"  {what}")
        yield


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Show long work, and give the memory that it frees back to the system: each stage would add to the last."""
    with busy(what):
        yield
    memory.give_back()


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
            found = f"  validation {_percent(position)}" if position.validation is not None else ""
            left = f"  {_clock(seconds)} left" if position.step < position.steps else ""
            say(f"  step {position.step}/{position.steps}  loss {position.loss:.3f}{found}{left}")
        yield position


def _percent(position: Position) -> str:
    return f"{100 * (position.validation or 0):.2f} ± {100 * (position.margin or 0):.2f} %"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
