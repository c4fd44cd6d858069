"""Runs the application on uvicorn: says when it is ready, and ends without losing a request."""

from __future__ import annotations

import asyncio
import atexit
import gc
import os
import select
import signal
import sys
from collections.abc import Callable
from functools import partial
from socket import socket
from types import FrameType
from typing import Any

import threadpoolctl
import uvicorn

from kshot_serve.api.app import create_app
from kshot_serve.backend import Backend
from kshot_serve.observe.logs import configure_logs
from kshot_serve.server.connections import Connections, raise_file_limit
from kshot_serve.server.listening import Acceptor, listen, url
from kshot_serve.settings import Settings

_MOMENT_S = 0.05
_MOMENTS = 20  # at the end, for the first request of a connection that was just made
_TURN_S = 0.001  # of several workers


def serve(settings: Settings, announce: Callable[[str], None], shared: socket | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C. `announce` gets one line when it is ready, which says where."""
    configure_logs(sys.stderr)
    raise_file_limit()
    # After each small product OpenBLAS's idle threads spin for a while: measured, they took half of two cores from the
    # models' runs.
    threadpoolctl.threadpool_limits(1, user_api="blas")
    Server(settings, announce, shared).run()
    atexit._run_exitfuncs()  # the log is written, and spans are sent
    sys.stdout.flush()
    os._exit(0)  # Python would wait for a thread that adapts for nobody any more, and may break over one that loads


class Server(uvicorn.Server):
    """uvicorn's server with two steps at its end.

    SIGTERM makes it not ready at once; for a moment it goes on taking requests, while load balancers look elsewhere
    (gh:triton-inference-server/server#6230). Then it takes none, answers what it has, and exits with 0.
    """

    def __init__(self, settings: Settings, announce: Callable[[str], None], shared: socket | None = None) -> None:
        """A `shared` socket is one whose connections other workers take too."""
        app = create_app(settings)
        self.backend: Backend = app.state.backend
        self._settings = settings
        self._announce = announce
        self._shared = shared
        self._connections = Connections(settings, self.backend.metrics, self.backend.budgets)
        self._acceptor: Acceptor | None = None
        self._hasty = False
        super().__init__(
            uvicorn.Config(
                app,
                settings.host,
                settings.port,
                http=self._connections.protocol,  # type: ignore[arg-type]
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
        """Answer from the first moment, that it is not ready; then load the model, unless told to end.

        A worker takes connections only when it has loaded: until then the others answer better.
        """
        listener = self._shared or listen(self.config.host, self.config.port)
        await super().startup([])  # uvicorn's own servers would listen at once
        if not self._shared:
            self._listen(listener)
        loading = self.backend.loading
        while not loading.done() and not self.should_exit:
            await asyncio.wait([loading], timeout=_MOMENT_S)
        if not loading.done():
            return
        try:
            await loading
        except BaseException:
            await self.shutdown()
            raise
        # Whole garbage collections, which hold up every request, pass over what stays: without this they took 200 ms.
        gc.collect()
        gc.freeze()
        gc.set_threshold(5_000, 20, 20)
        if self._shared:
            self._listen(listener)
        champions = self.backend.champions
        what = f"{champions.current.name} version {champions.current.version}" if champions.ready else "no model yet"
        self._announce(f"kshot serves {what} at {url(listener)}")

    def _listen(self, listener: socket) -> None:
        protocol = partial(self._connections.protocol, self.config, self.server_state, self.lifespan.state)
        self._acceptor = Acceptor(listener, protocol, _TURN_S if self._shared else 0)

    async def main_loop(self) -> None:
        """Until it is told to end; then what comes by connections that there are is answered for a moment more."""
        await super().main_loop()
        self.backend.leave()
        if not self._hasty:
            await asyncio.sleep(self._settings.leave_s)
        assert self._acceptor is not None
        await self._acceptor.close()
        silent, idle, moments = self._connections.silent, self._connections.idle, 0
        while not self._hasty and (silent or idle) and moments < _MOMENTS:
            come = [each for each in (*silent, *idle) if _has_come(each.transport)]
            for each in set(idle).difference(come):
                each.shutdown()
            moments += not come  # a busy server reads late
            await asyncio.sleep(_MOMENT_S)
        self.backend.drain()

    async def shutdown(self, sockets: Any = None) -> None:
        if self._acceptor:
            await self._acceptor.close()
        await super().shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.backend.leave()
        self._hasty = self._hasty or sig == signal.SIGINT
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # or it would be raised again at the end, though all went well


def _has_come(transport: asyncio.Transport) -> bool:
    """Whether a connection has something that was not read yet: closing it would be a read error to its client."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))
