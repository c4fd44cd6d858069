"""Memory between torch and the system: kept while meta-training takes the same blocks in every step, then given back.

glibc asks the system for each large block anew and returns it when it is freed, and the system clears it page by page:
on a CPU that is half of a step on 84 x 84 images (`python bench/training_memory.py`). What lies between blocks that
are in use is not returned by itself at all, so that stage after stage a process grows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_TRIM_BYTES, _MMAPS = 128 << 10, 65536  # glibc's defaults
_NEVER = 2**31 - 1


@contextmanager
def kept() -> Iterator[None]:
    """Within the block, what is freed stays with this process. Without glibc this does nothing."""
    _set(_NEVER, 0)
    try:
        yield
    finally:
        _set(_TRIM_BYTES, _MMAPS)
        give_back()


def give_back() -> None:
    """Return what is free to the system."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _set(trim_bytes: int, mmaps: int) -> None:
    if libc := _glibc():
        libc.mallopt(_M_TRIM_THRESHOLD, trim_bytes)
        libc.mallopt(_M_MMAP_MAX, mmaps)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
