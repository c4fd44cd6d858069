"""What several servers on one Postgres know of each other's writes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from kshot_serve.spaces.revisions import Revisions
from kshot_serve.storage.database import LEASE_S
from kshot_serve.storage.store import Store

DAY = 86400.0


class Servers:
    """A server that writes to a label space and one that is asked about it; their clocks are two days apart."""

    def __init__(self, postgres: str) -> None:
        self.writer = Store(postgres, now=lambda: time.time() + DAY)
        self.asked = Store(postgres, now=lambda: time.time() - DAY)
        with self.writer.creating("shared", None, "", 10) as new:
            pass
        self.space = new.space

    def write(self) -> int:
        with self.writer.write(self.space, "add_class", "") as change:
            change.add_class(f"class {time.time_ns()}")
        return change.number


@pytest.fixture
def servers(postgres: str) -> Iterator[Servers]:
    made = Servers(postgres)
    yield made
    made.writer.delete(made.space)
    for store in (made.writer, made.asked):
        store.close()


def test_an_acknowledged_write_is_seen_by_the_next_request_to_another_server(servers: Servers) -> None:
    async def body() -> None:
        revisions, over = Revisions(servers.asked), False

        async def asks() -> None:
            while not over:
                await revisions.get(servers.space)
                await asyncio.sleep(0)

        asking = asyncio.create_task(asks())
        try:
            for _ in range(10):
                began = time.monotonic()
                written = await asyncio.to_thread(servers.write)
                assert await revisions.get(servers.space) == (written, False)
                assert time.monotonic() - began > LEASE_S
        finally:
            over = True
            await asking

    asyncio.run(body())


def test_a_revision_of_postgres_is_used_for_30_ms_by_the_server_that_asked(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("kshot_serve.spaces.revisions.monotonic", lambda: now)

    async def body() -> None:
        nonlocal now
        revisions = Revisions(servers.asked)
        before, _ = await revisions.get(servers.space)
        written = servers.write()
        now = 0.014  # as after a suspension, which the clock does not count
        assert await revisions.get(servers.space) == (before, False)
        now = 0.03
        assert await revisions.get(servers.space) == (written, False)

    asyncio.run(body())
