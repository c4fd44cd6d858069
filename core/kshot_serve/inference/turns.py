"""Room that calls wait for, in turn by caller."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kshot_serve.budgets import Share, current_caller

_SHARE = 0.5  # of the room that one caller may hold while others wait


class Turns:
    """An amount of room. Callers that wait for some get it one after the other, and each gets its calls in order.

    A caller may hold all of it while nobody else waits, and its share otherwise.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._held = Share(room, _SHARE, "queue", "")
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}  # in the order of their turn

    @asynccontextmanager
    async def turn(self, amount: int = 1) -> AsyncIterator[None]:
        """Hold an amount during a block, once it is free; all of the room stands for more than that."""
        caller, amount = current_caller.get(), min(amount, self.room)
        if self._waiting or not self._held.fits(caller, amount, all_of_it=True):
            await self._wait(caller, amount)
        else:
            self._held.take(caller, amount, all_of_it=True)
        try:
            yield
        finally:
            self._held.give(caller, amount)
            self._grant()

    async def _wait(self, caller: str, amount: int) -> None:
        go_on = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append((amount, go_on))
        try:
            await go_on
        except asyncio.CancelledError:
            if not go_on.cancelled():  # it was granted at the same moment
                self._held.give(caller, amount)
            self._grant()
            raise

    def _grant(self) -> None:
        """Let those go on whose turn it is and for whom there is room."""
        for caller, calls in list(self._waiting.items()):
            while calls and calls[0][1].done():  # given up
                calls.popleft()
            if not calls:
                del self._waiting[caller]
        for caller, calls in list(self._waiting.items()):
            amount, go_on = calls[0]
            alone = len(self._waiting) == 1 or not self._held.taken
            if self._held.fits(caller, amount, all_of_it=alone):
                self._held.take(caller, amount, all_of_it=alone)
                go_on.set_result(None)
                calls.popleft()
                del self._waiting[caller]
                if calls:
                    self._waiting[caller] = calls  # behind the others
                return self._grant()
        return None
