"""Locks between processes that the operating system releases when a process ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from prefect.locking.protocol import LockManager

from kshot_flows.console import progress


class ProcessLocks(LockManager):
    """Locks that the operating system releases when their process ends, so that a killed one does not block others.

    Prefect's own file locks remain after kill -9, and block the next process for ever.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[str, tuple[str, FileLock]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessLocks:
        return self  # Prefect copies policies; a lock must not be copied

    def acquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        if self.is_lock_holder(key, holder):
            return True
        lock = self._lock(key)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                progress.say("  another process is at this very step; waiting for it")
                lock.acquire(timeout=-1 if acquire_timeout is None else acquire_timeout)
        except Timeout:
            return False
        self._held[key] = (holder, lock)
        return True

    async def aacquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        return self.acquire_lock(key, holder, acquire_timeout, hold_timeout)

    def release_lock(self, key: str, holder: str) -> None:
        if not self.is_lock_holder(key, holder):
            raise ValueError(f"{holder} does not hold the lock of {key}")
        self._held.pop(key)[1].release()

    def is_locked(self, key: str) -> bool:
        return key in self._held or not self.wait_for_lock(key, 0)

    def is_lock_holder(self, key: str, holder: str) -> bool:
        return key in self._held and self._held[key][0] == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        try:
            with self._lock(key).acquire(timeout=-1 if timeout is None else timeout):
                return True
        except Timeout:
            return False

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        return self.wait_for_lock(key, timeout)

    def _lock(self, key: str) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / f"{key}.lock", thread_local=False)
