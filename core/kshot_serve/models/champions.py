"""Follows the registry: has a new version tried, loads it, and replaces the champion with it."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
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
from kshot_serve.models.candidate import CandidateError, StuckError, try_out
from kshot_serve.models.champion import Champion
from kshot_serve.models.registry import RegisteredVersion, Registry, RegistryError
from kshot_serve.models.shelf import Shelf
from kshot_serve.models.warmup import Loader
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import Settings

T = TypeVar("T")

log = logging.getLogger(__name__)

_LIMITS_S = 300.0  # until a bundle that label spaces are too large for is tried again: loading it is work
_REST = 10  # a version that hung is tried again after so many times the time that it had
_AWAY = "the registry names no version, or does not answer"
_WORDS = {
    "late": "it was not loaded and warm in time",
    "crashed": "the process that tried it crashed",
    "bundle": "its files or its graphs fail a check",
    "spaces": "it does not suit the label spaces",
    "failed": "something failed while it was tried",
}
"""Reasons for a refusal: the metric's label, and its text in the log and in `degraded`."""


async def _nothing(_: Champion) -> None:
    pass


@dataclass(frozen=True, eq=False)
class _Refused:
    """A version that is not tried again until then, in time.monotonic's seconds."""

    version: RegisteredVersion
    error: KshotError
    trouble: str
    until: float


class Champions:
    """Gives the champion of now; finds, checks and warms its successors."""

    def __init__(self, settings: Settings, loader: Loader, metrics: Metrics) -> None:
        self.on_change: Callable[[Champion], Awaitable[None]] = _nothing  # before the pointer moves; raising refuses it
        self.on_settled: Callable[[Champion], Awaitable[None]] = _nothing  # when the pointer has moved
        self._settings = settings
        self._loader = loader
        self._metrics = metrics
        follows = settings.source.startswith("models:")
        self._registry = Registry(settings.source, settings.registry) if follows else None
        self._shelf = Shelf(settings.champions)
        self._current: Champion | None = None
        self._serving: RegisteredVersion | None = None  # what the registry calls the current champion
        self._refused: _Refused | None = None  # the newest that was
        self._trouble: str | None = None
        self._stopping = False
        self._following = asyncio.Lock()
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

        Of a registry's versions the last good one that this server had serves at once; then the registry is asked. A
        registry that is away, or names no version yet, is waited for: not ready until then.
        """
        if (registry := self._registry) is None:
            bundle = await _aside(self._loader, self._settings.source)
            await self._take(bundle, bundle.manifest.source.recipe or Path(self._settings.source).stem, "0")
            return
        await _aside(self._shelf.tidy)
        kept = await _aside(self._shelf.last)
        if kept and registry.may_name(kept[0]):
            try:
                await self._change(*kept)
                self._set_trouble("the registry has not answered yet")
            except KshotError as error:
                log.warning("the copy of version %s cannot serve, and is fetched again: %s", kept[0].number, error)
        if self._current is None:
            await self.follow()
            if self._current is None and self._refused:
                raise self._refused.error
            self._polling = asyncio.create_task(self._poll(self._settings.poll_s))
        else:
            self._polling = asyncio.create_task(self._poll(0))

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
        async with self._following:
            try:
                version = await asyncio.wait_for(_aside(registry.find), self._settings.candidate_s)
            except (RegistryError, TimeoutError) as error:
                self._report(_AWAY, error)
                return
            except KshotError as error:  # there is no client to ask it with
                if self._current is None:
                    raise
                self._report(_AWAY, error)
                return
            if (refused := self._refused) and version == refused.version and monotonic() < refused.until:
                self._report(refused.trouble, refused.error)
                return
            try:
                if version != self._serving:
                    await self._try(version)
                self._report(None)
            except RegistryError as error:
                self._report(f"version {version.number} cannot be fetched", error)
            except Exception as error:
                self._refuse(version, error)

    async def _poll(self, wait: float) -> None:
        while True:
            await asyncio.sleep(wait)
            await self.follow()
            wait = self._settings.poll_s

    async def _try(self, version: RegisteredVersion) -> None:
        self._metrics.candidate_since.set(time.time())
        try:
            folder = await try_out(version, self._settings, self._loader)
            await self._change(version, folder)
        finally:
            self._metrics.candidate_since.set(0)
            await _aside(self._shelf.tidy)  # a child that was killed leaves what it had begun to fetch
        try:
            await _aside(self._shelf.keep, version, folder)
        except OSError as error:
            log.error("version %s serves, but cannot be kept for when the registry is away: %s", version.number, error)

    async def _change(self, version: RegisteredVersion, folder: Path) -> None:
        """Load a version from this disk, and let it take over."""
        try:
            bundle = await asyncio.wait_for(_aside(self._loader, folder), self._settings.candidate_s)
        except TimeoutError:
            raise StuckError(self._settings.candidate_s) from None
        await self._take(bundle, version.name, version.number)
        self._serving = version

    async def _take(self, bundle: Bundle, name: str, version: str) -> None:
        """Let everyone get ready for a champion, and then move the pointer: requests under way keep the old one."""
        champion = Champion(bundle, bundle.manifest.id, name, version, self._settings.source)
        await self.on_change(champion)
        if before := self._current:
            self._metrics.champion.labels(before.name, before.version, before.id).set(0)
        self._current = champion
        self._metrics.ready.set(self.ready)
        self._metrics.champion.labels(name, version, champion.id).set(1)
        self._metrics.swaps.labels("taken", "").inc()
        log.info("version %s of %s serves, bundle %s on %s", version, name, champion.id, bundle.device)
        try:
            await self.on_settled(champion)
        except Exception:
            log.exception("the champion serves, but what should follow its taking over failed")

    def _refuse(self, version: RegisteredVersion, error: Exception) -> None:
        """Not this version, and not again soon; what is an accident is tried again at once."""
        reason, wait = "failed", 0.0
        if isinstance(error, CandidateError):
            reason = "late" if isinstance(error, StuckError) else "crashed"
            wait = max(_LIMITS_S, _REST * self._settings.candidate_s)
        elif isinstance(error, Problem):
            reason = "spaces"
            if error.status < 500 and error.retry_after is None:  # it will not end otherwise the next time
                wait = _LIMITS_S if error.reason == "limits" else math.inf  # classes may be deleted meanwhile
        elif isinstance(error, KshotError):
            reason, wait = "bundle", math.inf
        trouble = f"version {version.number} was refused: {_WORDS[reason]}"
        if isinstance(error, KshotError) and wait:
            self._refused = _Refused(version, error, trouble, monotonic() + wait)
        self._metrics.swaps.labels("refused", reason).inc()
        self._report(trouble, error)

    def _report(self, trouble: str | None, error: Exception | None = None) -> None:
        if trouble != self._trouble:
            if trouble:
                log.error("%s: %s", trouble, error)
            else:
                log.info("what the registry names serves")
        self._set_trouble(trouble)

    def _set_trouble(self, trouble: str | None) -> None:
        self._trouble = trouble
        self._metrics.degraded.set(trouble is not None)


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

    threading.Thread(target=work, name="kshot-aside", daemon=True).start()
    return await answer
