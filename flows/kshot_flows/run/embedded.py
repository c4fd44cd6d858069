"""Prefect's API: the configured server, or else an embedded one in a thread of this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path

from filelock import FileLock
from prefect import get_client
from prefect.events.worker import EventsWorker
from prefect.settings import (
    PREFECT_API_BLOCKS_REGISTER_ON_START,
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_LOGGING_TO_API_ENABLED,
    PREFECT_UI_ENABLED,
    temporary_settings,
)

from kshot_flows import project
from kshot_runtime.errors import KshotError


def configured() -> bool:
    """Whether a Prefect server is configured."""
    return bool(PREFECT_API_URL.value())


@contextmanager
def api() -> Iterator[str]:
    """A Prefect API for the block: the configured one (PREFECT_API_URL or a profile), or else an embedded one.

    The embedded one runs in a thread, so it ends with this process, and starts in two seconds, while Prefect's
    own takes eight. Its database is `.kshot/prefect.db`, and it starts no scheduled runs.
    """
    if url := PREFECT_API_URL.value():
        with get_client(sync_client=True) as client:
            failure = client.api_healthcheck()
        if failure:
            raise KshotError(
                f"no Prefect server answers at {url} ({failure}). Start it, or unset PREFECT_API_URL (and see "
                "`prefect config view`) to run without one."
            )
        yield url
        return
    folder = project.home() / ".kshot"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # its thread would add a second to each flow
        PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        PREFECT_API_BLOCKS_REGISTER_ON_START: False,
        PREFECT_LOGGING_TO_API_ENABLED: False,
        PREFECT_UI_ENABLED: False,
    }
    with temporary_settings(settings), _server(folder) as url, temporary_settings({PREFECT_API_URL: url}):
        yield url


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    import uvicorn
    from prefect.server.api.server import create_app

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = create_app(ephemeral=True, final=True, ignore_cache=True)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        # Settings are context variables, which a new thread does not inherit.
        context = copy_context()
        thread = threading.Thread(target=context.run, args=(server.run, [listening]), name="prefect", daemon=True)
        with FileLock(folder / "prefect.lock"):  # the first start creates the tables
            thread.start()
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError(f"Prefect's server did not start; see {folder / 'prefect.db'}")
                time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        finally:
            EventsWorker.drain_all(timeout=10)  # events are sent by a separate thread
            server.should_exit = True
            thread.join(timeout=10)
