"""Runs the application on uvicorn: says when it is ready, and ends without losing a request."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import threadpoolctl
import uvicorn

from kshot_serve.api.app import create_app
from kshot_serve.backend import Backend
from kshot_serve.observe.logs import configure_logs
from kshot_serve.server.connections import Connections, raise_file_limit
from kshot_serve.server.listening import bind, url
from kshot_serve.settings import Settings

_MOMENT_S = 0.05


def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C. `announce` gets one line when it is ready, which says where."""
    configure_logs(sys.stderr)
    raise_file_limit()
    # After each small product OpenBLAS's idle threads spin for a while: measured, they took half of two cores from the
    # models' runs.
    threadpoolctl.threadpool_limits(1, user_api="blas")
    server = Server(settings, announce)
    server.run()
    if not server.backend.idle:  # Python would wait for a thread that adapts, and may break over one that loads
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


class Server(uvicorn.Server):
    """uvicorn's server with two steps at its end.

    SIGTERM makes it not ready at once; for a moment it goes on taking requests, while load balancers look elsewhere
    (gh:triton-inference-server/server#6230). Then it takes none, answers what it has, and exits with 0.
    """

    def __init__(self, settings: Settings, announce: Callable[[str], None]) -> None:
        app = create_app(settings)
        self.backend: Backend = app.state.backend
        self._settings = settings
        self._announce = announce
        self._hasty = False
        super().__init__(
            uvicorn.Config(
                app,
                settings.host,
                settings.port,
                http=Connections(settings, self.backend.metrics, self.backend.budgets.connections).protocol,  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=round(2 * settings.idle_s) + 1,  # ours is sooner
                timeout_graceful_shutdown=max(1, round(settings.drain_s - settings.leave_s)),
            )
        )

    async def startup(self, sockets: Any = None) -> None:
        """Answer from the first moment, that it is not ready; then load the model, unless told to end."""
        listener = bind(self.config.host, self.config.port, shared=self._settings.workers > 1)
        await super().startup([listener])
        loading = self.backend.loading
        while not loading.done() and not self.should_exit:
            await asyncio.wait([loading], timeout=_MOMENT_S)
        if not loading.done():
            return
        try:
            await loading
        except BaseException:
            await self.shutdown([listener])
            raise
        champions = self.backend.champions
        what = f"{champions.current.name} version {champions.current.version}" if champions.ready else "no model yet"
        self._announce(f"kshot serves {what} at {url(listener)}")

    async def main_loop(self) -> None:
        await super().main_loop()
        self.backend.leave()
        if not self._hasty:
            await asyncio.sleep(self._settings.leave_s)
        self.backend.drain()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.backend.leave()
        self._hasty = self._hasty or sig == signal.SIGINT
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, but the signal is not raised again at the end: a server that was asked to stop did well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
