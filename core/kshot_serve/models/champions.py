"""Follows the registry: fetches, checks and warms a new version, then replaces the champion."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from kshot_runtime.bundle import Bundle
from kshot_runtime.errors import KshotError
from kshot_serve.errors import Problem
from kshot_serve.models.champion import Champion
from kshot_serve.models.registry import Found, Registry, RegistryError
from kshot_serve.models.shelf import Shelf
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import Settings

T = TypeVar("T")

log = logging.getLogger(__name__)

_LIMITS_S = 300.0  # until a bundle that label spaces are too large for is tried again: loading it is work


async def _nothing(_: Champion) -> None:
    pass


@dataclass(frozen=True, eq=False)
class _Refused:
    """A version that is not tried again until then, in time.monotonic's seconds."""

    found: Found
    why: KshotError
    until: float


class Champions:
    """Gives the champion of now; finds, checks and warms its successors."""

    def __init__(self, settings: Settings, opened: Callable[[str | Path], Bundle], metrics: Metrics) -> None:
        self.on_change: Callable[[Champion], Awaitable[None]] = _nothing  # before the pointer moves; raising refuses it
        self.on_settled: Callable[[Champion], Awaitable[None]] = _nothing  # when the pointer has moved
        self._opened = opened  # opens and warms a bundle
        self._metrics = metrics
        self._source = settings.source
        self._poll_s = settings.poll_s
        follows = settings.source.startswith("models:")
        self._registry = Registry(settings.source, settings.registry) if follows else None
        self._shelf = Shelf(settings.folder / "champions")
        self._current: Champion | None = None
        self._serving: Found | None = None  # what the registry calls the current champion
        self._refused: _Refused | None = None  # the newest that was
        self._trouble: str | None = None
        self._stopping = False
        self._polling: asyncio.Task[None] | None = None

    @property
    def current(self) -> Champion:
        if self._current is None:
            raise Problem("not_ready", "no model is loaded yet; try again soon", retry_after=1.0)
        return self._current

    @property
    def ready(self) -> bool:
        """Whether a champion is loaded and warm, and the server is not stopping."""
        return self._current is not None and not self._stopping

    @property
    def degraded(self) -> str | None:
        """Why what serves may not be what the registry names."""
        if self._trouble is None:
            return None
        instead = f"version {self._current.version} serves" if self._current else "no model serves yet"
        return f"{self._trouble}; {instead}"

    async def start(self) -> None:
        """Have a champion. A bundle that cannot serve, and no other to fall back on, is a KshotError.

        A registry that is away, or names no version yet, is waited for: not ready until then.
        """
        if self._registry is None:
            bundle = await _aside(self._opened, self._source)
            await self._take(bundle, bundle.manifest.source.recipe or Path(self._source).stem, "0")
            return
        await _aside(self._shelf.tidy)
        await self.follow()
        if self._current is None and (last := await _aside(self._shelf.last, self._registry.name)):
            found, folder = last
            await self._take(await _aside(self._opened, folder), found.name, found.version)
            self._serving = found
        if self._current is None and self._refused:
            raise self._refused.why
        self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Not ready from now on, and no new champions; the current one goes on answering."""
        self._stopping = True
        self._metrics.ready.set(0)
        if self._polling:
            self._polling.cancel()
            with suppress(asyncio.CancelledError):
                await self._polling

    async def follow(self) -> None:
        """Ask the registry once, and serve what it names, if that can serve. Done every `poll_s` by itself."""
        if (registry := self._registry) is None:
            return
        try:
            found = await _aside(registry.find)
        except RegistryError as error:
            self._report("the registry names no version, or does not answer", error)
            return
        if (refused := self._refused) and found == refused.found and monotonic() < refused.until:
            self._report(f"version {found.version} was refused", refused.why)
            return
        try:
            if found != self._serving:
                await self._change(registry, found)
            self._report(None)
        except RegistryError as error:
            self._report(f"version {found.version} cannot be fetched", error)
        except Exception as error:
            if isinstance(error, KshotError) and not _is_accident(error):
                limits = isinstance(error, Problem) and error.reason == "limits"  # classes may be deleted meanwhile
                self._refused = _Refused(found, error, monotonic() + (_LIMITS_S if limits else math.inf))
            self._metrics.swaps.labels("refused").inc()
            self._report(f"version {found.version} was refused", error)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            await self.follow()

    async def _change(self, registry: Registry, found: Found) -> None:
        folder = await _aside(self._shelf.fetch, registry, found)
        await self._take(await _aside(self._opened, folder), found.name, found.version)
        self._serving = found
        try:
            await _aside(self._shelf.keep, found, folder)
        except OSError as error:
            log.error("version %s serves, but cannot be kept for when the registry is away: %s", found.version, error)

    async def _take(self, bundle: Bundle, name: str, version: str) -> None:
        """Let everyone get ready for a champion, and then move the pointer: requests under way keep the old one."""
        champion = Champion(bundle, bundle.manifest.id, name, version, self._source)
        await self.on_change(champion)
        if before := self._current:
            self._metrics.champion.labels(before.name, before.version, before.id).set(0)
        self._current = champion
        self._metrics.ready.set(self.ready)
        self._metrics.champion.labels(name, version, champion.id).set(1)
        self._metrics.swaps.labels("taken").inc()
        log.info("version %s of %s serves, bundle %s on %s", version, name, champion.id, bundle.device)
        try:
            await self.on_settled(champion)
        except Exception:
            log.exception("the champion serves, but what should follow its taking over failed")

    def _report(self, trouble: str | None, error: Exception | None = None) -> None:
        if trouble != self._trouble:
            if trouble:
                log.error("%s: %s", trouble, error)
            else:
                log.info("what the registry names serves again")
        self._trouble = trouble
        self._metrics.degraded.set(trouble is not None)


def _is_accident(error: KshotError) -> bool:
    """Whether it may end otherwise the next time."""
    return isinstance(error, Problem) and (error.status >= 500 or error.retry_after is not None)


async def _aside(function: Callable[..., T], *args: Any) -> T:
    """A long call in a thread that does not hold up the end of the process: a network may never answer."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: object) -> None:
        if not answer.done():
            set_it(value)

    def work() -> None:
        try:
            settled = partial(settle, answer.set_result, function(*args))
        except Exception as error:
            settled = partial(settle, answer.set_exception, error)
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settled)

    threading.Thread(target=work, name=f"kshot-{getattr(function, '__name__', 'aside')}", daemon=True).start()
    return await answer
