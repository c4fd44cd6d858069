"""A table in the terminal, as every command shows one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def table(*columns: str, **more: Any) -> Table:
    """An empty table with these columns, which fold what is long; `more` is what rich's Table takes."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, **more)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made
