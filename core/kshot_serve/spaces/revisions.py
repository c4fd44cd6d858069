"""The newest revision of each label space, asked of the database as seldom as the promise allows.

The promise: a request that comes after a write was acknowledged, by any server, sees it. SQLite is read at a glance,
each time. On Postgres what was read holds for LEASE_S from the moment of asking, and a write is acknowledged LEASE_S
after its commit; whoever asks after that is answered with something read later.
"""

from __future__ import annotations

import asyncio
from time import monotonic

from kshot_serve.errors import Problem
from kshot_serve.storage.database import LEASE_S
from kshot_serve.storage.store import Store

_AHEAD = 0.5  # of a lease is over when the next is asked for, so that nobody waits for it


class Revisions:
    """Who asks while others are being answered is answered with the next."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[int, float]] = {}  # revision, and when it was asked for
        self._asked: dict[str, asyncio.Future[int]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def get(self, space: str) -> tuple[int, bool]:
        """The newest revision, and whether it is only the last one known, because the database is away."""
        if (revision := self._store.glance(space)) is not None:
            self._known[space] = revision, 0.0
            return revision, False
        known, asked = self._known.get(space, (0, 0.0))
        if known and (age := monotonic() - asked) < LEASE_S:
            if age > _AHEAD * LEASE_S:
                self._ask(space)
            return known, False
        try:
            return await asyncio.shield(self._ask(space)), False
        except Problem as problem:
            if problem.code == "space_unknown":
                self._known.pop(space, None)
            if known and self._store.bridges(problem):
                return known, True
            raise

    def _ask(self, space: str) -> asyncio.Future[int]:
        answer = self._asked.get(space)
        if answer is None:
            answer = self._asked[space] = asyncio.get_running_loop().create_future()
            answer.add_done_callback(lambda done: done.exception())  # whoever asked may have gone
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        return answer

    async def _read(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            began = monotonic()
            try:
                found = await self._store.soon(self._store.newest, list(asked))
            except Exception as error:
                for answer in asked.values():
                    answer.set_exception(error)
                continue
            for space, answer in asked.items():
                if space in found:
                    self._known[space] = found[space], began
                    answer.set_result(found[space])
                else:
                    answer.set_exception(Problem("space_unknown", "there is no such label space"))
        self._reading = None
