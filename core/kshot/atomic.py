"""Replaces a folder by a new one, so that the old or the new content always exists."""

from __future__ import annotations

from pathlib import Path


def replace(folder: Path, new: Path) -> None:
    """Move `new` to `folder`. The old folder is left beside the former place of `new`, for the caller to delete."""
    if not folder.exists():
        new.rename(folder)
        return
    old = new.with_name(f"{new.name}~old")
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
