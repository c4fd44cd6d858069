"""Tunes glibc's malloc for torch on a CPU: inside `kept()`, freed memory stays in the heap and is used again.

By default each large block is mapped anew and unmapped when it is freed, and the system clears it page by page: half
of a training step, and more of an evaluation (`python bench/training_memory.py`). Two things to know of glibc: memory
of threads with an arena of their own is unmapped whatever the settings, so there is one arena; and any setting ends
the adjustment of its thresholds by itself, so `kept` leaves the highest that this adjustment would have led to.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # malloc.h
_NEVER = 2**31 - 1
_MAPPED_FROM = 32 << 20  # bytes of a block: the most that glibc accepts, and comes to by itself

_lock = threading.Lock()
_blocks = 0  # that are inside `kept`, of the whole process


@contextmanager
def kept() -> Iterator[None]:
    """Within the block, what is freed stays with this process; afterwards it is returned. Without glibc a no-op.

    Blocks may be nested, and only the outermost counts. Where blocks of many sizes alternate, the heap takes up to
    twice the memory that is in use at once: `give_back` between two stages.
    """
    _enter(+1)
    try:
        yield
    finally:
        _enter(-1)


def give_back() -> None:
    """Return what is free to the system."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _enter(change: int) -> None:
    global _blocks
    with _lock:
        before, _blocks = _blocks, _blocks + change
        if before == 0:
            _set({_ARENA_MAX: 1, _TRIM_THRESHOLD: _NEVER, _MMAP_MAX: 0})
        elif _blocks == 0:
            _set({_MMAP_MAX: 65536, _MMAP_THRESHOLD: _MAPPED_FROM, _TRIM_THRESHOLD: _MAPPED_FROM})
            give_back()


def _set(parameters: dict[int, int]) -> None:
    if libc := _glibc():
        for parameter, value in parameters.items():
            libc.mallopt(parameter, value)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
