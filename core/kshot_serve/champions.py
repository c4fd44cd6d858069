"""The bundle that serves: warm before it counts, replaced by moving one pointer, the last good one kept on disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from kshot_runtime.bundle import Bundle
from kshot_serve.engine import Engine, warm
from kshot_serve.problems import Problem
from kshot_serve.settings import Settings
from kshot_serve.telemetry import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Champion:
    """A bundle at work, with the name and version that it goes by."""

    bundle: Bundle
    id: str  # the bundle's, which names exactly its graphs
    name: str
    version: str
    source: str


async def nothing(_: Champion) -> None:
    """For whoever does not care about changes."""


class Champions:
    """Gives the champion of now; finds, checks and warms its successors."""

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self.on_change: Callable[[Champion], Awaitable[None]] = nothing  # before the pointer moves; raising refuses it
        self.on_settled: Callable[[Champion], Awaitable[None]] = nothing  # after the pointer has moved
        self.degraded: str | None = None
        self._settings = settings
        self._engine = engine
        self._metrics = metrics
        self._current: Champion | None = None
        self._stopping = False

    @property
    def current(self) -> Champion:
        if self._current is None:
            raise Problem("not_ready", "no model is loaded yet; try again soon", retry_after=1.0)
        return self._current

    @property
    def ready(self) -> bool:
        """Whether a champion is loaded and warm, and the server is not stopping."""
        return self._current is not None and not self._stopping

    async def start(self) -> None:
        source = Path(self._settings.source)
        bundle = await asyncio.to_thread(self._open, source)
        name = bundle.manifest.source.recipe or source.stem
        await self._take(Champion(bundle, bundle.manifest.id, name, "0", str(source)))

    async def stop(self) -> None:
        self._stopping = True
        self._metrics.ready.set(0)

    def _open(self, path: Path) -> Bundle:
        bundle = Bundle.open(path, self._engine.device, self._engine.threads)
        warm(bundle, self._engine.buckets)
        return bundle

    async def _take(self, champion: Champion) -> None:
        await self.on_change(champion)
        self._current = champion
        self._metrics.ready.set(not self._stopping)
        self._metrics.champion.clear()
        self._metrics.champion.labels(champion.name, champion.version, champion.id).set(1)
        await self.on_settled(champion)
