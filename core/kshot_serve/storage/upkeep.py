"""What a store does beside its requests: scrub what was deleted, keep room for deletions, ask whether it is there."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, sleep

from kshot_serve.errors import Problem
from kshot_serve.storage.engines import full
from kshot_serve.storage.health import Health

_PROBE_S = 1.0
_RETRY_S = 0.2  # between attempts to scrub, while someone reads
_BUSY_MS = 50  # an attempt may hold up writers for so long
_ROOM_S = 3.0  # for a deletion to wait for room
_FREE_BYTES = 8_000_000  # a disk with so much room is not full
_PAGES = 1000  # that are given back to the disk in one transaction


class SqliteFile:
    """The files of a SQLite database: what of them can be overwritten, given back or kept in reserve."""

    def __init__(self, path: Path, reserve: int) -> None:
        self._path = path
        self._reserve = path.with_name(f"{path.name}-reserve")
        self._reserve_bytes = reserve
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        self._connection.execute("PRAGMA secure_delete=ON")

    def scrub(self) -> bool:
        """Take what was deleted out of the log; its pages are overwritten by `secure_delete`. False: others read."""
        try:
            busy, *_ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.OperationalError:
            return False
        return not busy

    def shrink(self) -> None:
        """Give the pages of what was deleted back to the disk."""
        with contextlib.suppress(sqlite3.OperationalError):
            while self._connection.execute("PRAGMA freelist_count").fetchone()[0]:
                before = self._connection.execute("PRAGMA page_count").fetchone()[0]
                self._connection.execute(f"PRAGMA incremental_vacuum({_PAGES})").fetchall()
                self.scrub()
                if self._connection.execute("PRAGMA page_count").fetchone()[0] == before:
                    return  # a database from before kshot asked SQLite to keep track of its pages

    def reserve(self) -> bool:
        """Take room that deletions can use when the disk is full. False: there is none to be had."""
        if self._reserve.exists() or not self._reserve_bytes:
            return True
        try:
            with self._reserve.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._reserve_bytes)
        except OSError:
            self._reserve.unlink(missing_ok=True)
            return False
        return True

    def release(self) -> bool:
        """Let a deletion use the reserve; whether there was one."""
        there = self._reserve.exists()
        self._reserve.unlink(missing_ok=True)
        return there

    @property
    def has_room(self) -> bool:
        return self._reserve.exists() and self._free > _FREE_BYTES

    @property
    def is_short(self) -> bool:
        """Whether the disk is nearly full; a reserve that was released is to be taken again, and is no room."""
        return self._free - (0 if self._reserve.exists() else self._reserve_bytes) <= _FREE_BYTES

    def takes(self, size: int) -> bool:
        """Whether there is room for so many bytes twice, in the log and in the file, and for what is in the log now."""
        log = self._path.with_name(f"{self._path.name}-wal")
        return self._free > 2 * size + (log.stat().st_size if log.exists() else 0)

    @property
    def _free(self) -> int:
        return shutil.disk_usage(self._path.parent).free

    def close(self) -> None:
        self._connection.close()


class Upkeep:
    """A thread that does it, from `start` or the first deletion on.

    `scrubs` say whether what was deleted is gone from where they look, `chore` whether it is to be called again.
    """

    def __init__(
        self,
        probe: Callable[[], None],
        file: SqliteFile | None,
        health: Health,
        scrubs: Sequence[Callable[[], bool]],
        chore: Callable[[], bool],
    ) -> None:
        self._probe = probe
        self._file = file
        self._scrubs = scrubs
        self._chore = chore
        self._health = health
        self._wanted, self._lock = threading.Event(), threading.Lock()
        self._scrub = self._tidying = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kshot-upkeep", daemon=True)

    def start(self) -> None:
        """Also scrubs what an earlier process did not come to."""
        with self._lock:
            if self._thread.ident is None:
                self._scrub = bool(self._scrubs)
                self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wanted.set()
        if self._thread.ident is not None:
            self._thread.join(10)  # longer only if the database is silent
        if self._file is not None:
            self._file.close()

    def deleted(self) -> None:
        """Something was deleted: scrub it, now and until it is done."""
        if self._scrubs:
            with self._lock:
                self._health.unscrubbed += 1
                self._scrub = True
            self.start()
            self._wanted.set()

    def check_room(self, size: int) -> None:
        """Refuse what SQLite could write to its log, but not from there to its file: deletions could not either."""
        if self._file is not None and size and not self._file.takes(size):
            raise full()

    def make_room(self) -> bool:
        """For a deletion on a full disk; False: there is none left. Waits for deletions before it to be scrubbed."""
        until = monotonic() + _ROOM_S
        while self._file is not None and not self._file.release():
            if monotonic() > until or not (self._scrub or self._tidying):
                return False
            sleep(0.02)
        return self._file is not None

    def _run(self) -> None:
        while not self._stopping:
            self._tidying = True
            self._tidy()
            self._tidying = False
            with contextlib.suppress(Problem), self._health.probing():
                self._probe()
            again = False
            with contextlib.suppress(Problem):
                again = self._chore()
            self._wanted.wait(0 if again else _RETRY_S if self._scrub else _PROBE_S)
            self._wanted.clear()

    def _tidy(self) -> None:
        file = self._file
        if self._scrub:
            with self._lock:
                count = self._health.unscrubbed
            scrubbed = [scrub() for scrub in self._scrubs]  # each of them, whatever the others say
            if all(scrubbed):
                with self._lock:
                    self._health.unscrubbed -= count
                    self._scrub = self._health.unscrubbed > 0
                # A deletion that was written, from the reserve perhaps, has ended what `full` says.
                if file is not None and count and (self._health.full or file.is_short):
                    file.shrink()
                self._health.tell()
        if file is not None and file.reserve() and self._health.full and file.has_room:
            self._health.full = False
            self._health.tell()
