"""What a server holds while it lives: the champion, the engine, the label spaces, the keys; how it starts and ends."""

from __future__ import annotations

import asyncio
import logging
import math
import sys

from starlette.requests import Request

from kshot_client import ClientError, Filling
from kshot_runtime.errors import KshotError
from kshot_serve.budgets import Budgets
from kshot_serve.errors import Problem
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champions import Champions
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import Settings
from kshot_serve.spaces.service import Spaces
from kshot_serve.storage.keys import Keys
from kshot_serve.storage.store import Store

log = logging.getLogger("kshot.serve")

DEADLINE = "x-kshot-deadline-ms"

_ORPHANS_S = 2.0  # for work that nobody waits for any more


class Backend:
    """The parts of a server. Of its end there are two steps: `leave` says not ready, `drain` takes nothing new."""

    def __init__(self, settings: Settings) -> None:
        if not (settings.on_loopback or settings.needs_keys or settings.exposed):
            raise KshotError(
                f"beyond this machine ({settings.host}) whoever reaches the port could do everything: leave keys on, "
                "or say --exposed if that is meant"
            )
        self.settings = settings
        self.metrics = Metrics()
        self.engine = Engine(settings.engine, self.metrics, settings.workers, settings.share)
        self.champions = Champions(settings, self.engine.open, self.metrics)
        self.store = Store(
            settings.database_url,
            metrics=self.metrics,
            stale_s=settings.stale_s,
            reserve=settings.reserve_mb * 1_000_000,
            photo_keys=settings.photo_keys,
        )
        self.store.check_photo_keys()
        self.spaces = Spaces(self.store, self.engine, self.champions, settings, self.metrics)
        self.decoder = self.spaces.decoder
        self.keys = Keys(self.store)
        self.budgets = Budgets(settings)
        try:
            self._fillings = [Filling(source) for source in settings.fill]
        except ClientError as error:
            raise KshotError(str(error)) from None
        self.leaving = self.draining = False

    async def start(self) -> None:
        """Answer, and load the model meanwhile: `loading` ends when it has been tried."""
        await self.engine.start()
        await self.spaces.start()
        self.loading = asyncio.create_task(self._load())
        self.loading.add_done_callback(_told)

    async def _load(self) -> None:
        await self.champions.start()
        for filling in self._fillings:
            try:
                await self._fill(filling)
            except ClientError as error:
                raise KshotError(str(error)) from None

    async def _fill(self, filling: Filling) -> None:
        """Make or update the label space of this name; standard error tells how far it is, and what was left out."""
        model, space = self.champions.current.bundle.manifest, await self.spaces.named(filling.name)
        _, classes = await self.spaces.classes(space.id)
        known = {each.name: [photo.sha256 for photo in each.photos] for each in classes}
        limits = model.limits.model_dump(include={"ways", "shots", "support"})
        for name, batch in filling.batches(known, **limits, photos=self.settings.photos):
            sound = []
            for file, upload in zip(batch, await self.decoder.read(list(batch.values()), model.image), strict=True):
                if isinstance(upload, Problem):
                    filling.skipped.append(f"{file}: {upload.message}")
                else:
                    sound.append(upload)
            if sound:
                written = await self.spaces.add(space.id, name, sound, who="--space", deadline=math.inf)
                filling.added += len(written.photos)
            if sys.stderr.isatty():
                sys.stderr.write(f"{filling}\r")
        sys.stderr.write("\n  ".join([str(filling), *filling.skipped]) + "\n")

    async def stop(self) -> None:
        """Finish what was accepted, and end."""
        self.leave()
        self.drain()
        self.loading.cancel()
        await asyncio.gather(self.loading, return_exceptions=True)
        await self.champions.stop()
        await self.engine.stop(_ORPHANS_S)
        await asyncio.to_thread(self.store.close)

    def leave(self) -> None:
        """Not ready from now on, so that nobody sends more; what comes all the same is still answered."""
        self.leaving = True
        self.metrics.ready.set(0)

    def drain(self) -> None:
        """Nothing new from now on."""
        self.draining = True
        self.engine.drain()

    @property
    def reasons(self) -> list[str]:
        """Why it is not ready, if so."""
        reasons = ["the server is stopping"] if self.leaving else []
        if not self.champions.ready and not self.leaving:
            reasons.append("no model is loaded yet")
        return reasons if self.store.health.bridged else [*reasons, *self.store.health.troubles]

    @property
    def ready(self) -> bool:
        return not self.reasons

    def deadline(self, request: Request, seconds: float | None = None) -> float:
        """When an answer comes too late, on the event loop's clock: the server's time, or a client's shorter one."""
        seconds = self.settings.engine.deadline_s if seconds is None else seconds
        if (asked := request.headers.get(DEADLINE)) is not None:
            if not asked.isascii() or not asked.isdigit() or not int(asked[:12]) > 0:
                raise Problem("bad_request", f"{DEADLINE} is no whole number of milliseconds above 0")
            seconds = min(seconds, int(asked[:12]) / 1000)
        return asyncio.get_running_loop().time() + seconds


def _told(loading: asyncio.Task[None]) -> None:
    if not loading.cancelled() and (error := loading.exception()) is not None:
        log.error("no model: %s", error)
