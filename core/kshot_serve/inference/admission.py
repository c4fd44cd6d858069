"""Admission: a request is begun, or refused at once, by two numbers: images at work, and the estimated wait."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import monotonic

from kshot_serve.budgets import Share, current_caller
from kshot_serve.errors import Problem
from kshot_serve.settings import EngineSettings

_MEMORY = 0.99  # of the measured rate: the last hundred images count


class Admission:
    """Images at work, by caller; and the rate at which they are done.

    A request is refused if the queue, or its caller's share of it, is full, or if the images before its own would take
    longer than `wait_s`. Decoding and batches serve callers in turn, so a caller waits for its own images and for as
    many of each other caller. One that comes while nothing is at work is always begun.
    """

    def __init__(self, settings: EngineSettings, share: float = 0.5) -> None:
        self.draining = False
        self._queue = Share(settings.queue, share, "queue", "")
        self._wait_s = settings.wait_s
        self._images, self._seconds = 1.0, 0.001  # done of late, and how long that took
        self._working, self._since, self._busy = 0, 0.0, 0.0
        self._empty = asyncio.Event()
        self._empty.set()

    def check(self, images: int = 1) -> None:
        """Raise the Problem of a request that would be refused now."""
        if self.draining:
            raise Problem("draining", "this server is stopping; ask another, or again later", retry_after=1.0)
        caller, queue = current_caller.get(), self._queue
        if not queue.taken:
            return
        ahead = min(queue.taken, (queue.held[caller] + images) * len({caller, *queue.held}) - images)
        wait = ahead * self._seconds / self._images
        if not queue.fits(caller, images):
            reason, limit = "queue", f"the queue of {queue.total}"
            if queue.taken + images <= queue.total:
                limit = f"one caller's share of {limit}"
        elif wait > self._wait_s:
            reason, limit = "wait", f"what can be begun in {self._wait_s:g} s"
        else:
            return
        seconds = max(1, math.ceil(wait))
        message = f"{queue.taken} images are being worked on, and {images} more would exceed {limit}"
        raise Problem("busy", f"{message}; try again in {seconds} s", retry_after=wait, reason=reason)

    @contextmanager
    def admit(self, images: int = 1) -> Iterator[None]:
        """Hold places for so many images during a block, or raise a Problem at once."""
        self.check(images)
        self._count_busy()
        caller, places = current_caller.get(), min(images, self._queue.total)
        self._queue.take(caller, places, all_of_it=True)
        self._empty.clear()
        try:
            yield
        finally:
            self._count_busy()
            kept = _MEMORY**images
            self._images = kept * self._images + images
            self._seconds = kept * self._seconds + max(1e-6, self._busy)
            self._busy = 0.0
            self._queue.give(caller, places)
            if not self._queue.taken:
                self._empty.set()

    @contextmanager
    def working(self) -> Iterator[None]:
        """A block in which images are decoded or run. Only such time counts: adapting and the database are no queue."""
        self.work(1)
        try:
            yield
        finally:
            self.work(-1)

    def work(self, change: int) -> None:
        """So many more are working now."""
        self._count_busy()
        self._working += change

    async def emptied(self) -> None:
        """Until nothing is at work."""
        await self._empty.wait()

    def _count_busy(self) -> None:
        now = monotonic()
        if self._working and self._queue.taken:
            self._busy += now - self._since
        self._since = now


@asynccontextmanager
async def timely(deadline: float) -> AsyncIterator[None]:
    """Give up what is not done by the deadline, in the event loop's seconds; infinity is none."""
    try:
        async with asyncio.timeout_at(None if math.isinf(deadline) else deadline):
            yield
    except TimeoutError:
        raise Problem("too_late", "no answer in time; try again", retry_after=1, reason="deadline") from None
