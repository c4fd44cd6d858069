"""Tables for all commands: wrapped to a terminal's width, unwrapped in a log."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kshot.evaluation.open_set import OpenSet

TRUST = ("calibration\nerror", "known\nthat\npass", "unknown\nlet in", "AUROC")
NARROW = (0, 1, 0, 0)  # narrow padding, so that a table of many numbers fits 80 columns


_WIDE = 1000  # width for a log: larger than any table, so nothing is wrapped


def console(**options: Any) -> Console:
    """A rich Console on the current standard output, with these options."""
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_WIDE if wide else None, **{"highlight": False, **options})


def table(*columns: str, **more: Any) -> Table:
    """An empty table whose columns wrap long text; `more` is passed to rich's Table."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, **more)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def numbers(table: Table, count: int) -> None:
    """Format the `count` columns after the first as numbers: right-aligned, not wrapped."""
    for column in table.columns[1 : 1 + count]:
        column.justify, column.no_wrap = "right", True


def trust(ece: float, found: OpenSet | None) -> list[str]:
    """The cells of the `TRUST` columns, at the default threshold; empty if unknown classes were not evaluated."""
    pair = ["", "", ""] if found is None else [found.accepted, found.false_accepts, found.auroc]
    return [share if isinstance(share, str) else f"{100 * share:.1f} %" for share in (ece, *pair)]
