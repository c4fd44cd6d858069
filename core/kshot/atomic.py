"""Replaces a folder by a new one, so that one of the two always exists."""

from __future__ import annotations

from pathlib import Path


def replace(folder: Path, new: Path) -> None:
    """Move `new` to `folder`; what was there is left beside where `new` was, for the caller to clear away."""
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
