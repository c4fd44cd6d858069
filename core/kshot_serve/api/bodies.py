"""Request bodies: counted and timed as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Message, Receive

from kshot_serve.budgets import Bodies
from kshot_serve.errors import Problem

_BODY_PACE = 100_000  # bytes of a body that earn it another second


class Body:
    """A request's body on its way in: at most `limit` bytes, in time, and within what all bodies may take.

    It has so many `seconds`, and earns more as it comes, so that a large one may take its time and one that drips may
    not. Bytes are counted as they come, so a body without Content-Length, or with a false one, gains nothing. `arrived`
    is called when it is complete or given up.
    """

    def __init__(self, receive: Receive, bodies: Bodies, length: int | None, limit: int, seconds: float) -> None:
        self.arrived: Callable[[], None] = lambda: None
        self._receive = receive
        self._bodies = bodies
        self._limit = limit
        self._seconds = seconds
        self._now = asyncio.get_running_loop().time
        self._until = self._now() + seconds
        self._came = self._taken = 0
        self.complete = asyncio.Event()
        if length is not None:
            self._take(length)

    async def receive(self) -> Message:
        """ASGI's receive."""
        if self.complete.is_set():
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise Problem(
                "body_too_slow",
                f"the body comes too slowly: {_BODY_PACE // 1000} kB a second are expected; send less at once",
            ) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._came += size
            self._take(self._came - self._taken)
            if message.get("more_body", False):
                self._until = min(self._until + size / _BODY_PACE, self._now() + self._seconds)
            else:
                self.complete.set()
                self.arrived()
        return message

    def _take(self, more: int) -> None:
        if more <= 0:
            return
        if self._taken + more > self._limit:
            raise Problem("body_too_large", f"a body may have at most {self._limit:,} bytes here")
        self._bodies.take(more)
        self._taken += more

    def close(self) -> None:
        self.arrived()
        self._bodies.give(self._taken)
        self._taken = 0
