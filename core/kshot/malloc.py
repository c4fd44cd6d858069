"""Tunes glibc's malloc for torch on a CPU: inside `kept()`, freed memory stays in the heap and is used again.

By default glibc maps each large block from the system and unmaps it when it is freed. The page faults take half the
time of a training step, and more of an evaluation (`python bench/training_memory.py`). glibc unmaps the memory of
secondary arenas whatever the settings, so `kept` allows one arena only. Any setting also disables glibc's dynamic
thresholds, so `kept` leaves behind the largest value that these would have reached.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # malloc.h
_NEVER = 2**31 - 1
_MAPPED_FROM = 32 << 20  # bytes of a block: the largest threshold, which glibc's dynamic one also reaches

_lock = threading.Lock()
_blocks = 0  # number of active `kept` blocks in this process


@contextmanager
def kept() -> Iterator[None]:
    """Inside the block, freed memory stays with this process; afterwards it is returned. A no-op without glibc.

    Blocks may be nested; the outermost decides. If allocations of many sizes alternate, the heap fragments to up to
    twice the memory in use: call `give_back` between stages.
    """
    _enter(+1)
    try:
        yield
    finally:
        _enter(-1)


def give_back() -> None:
    """Return free memory to the system."""
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
