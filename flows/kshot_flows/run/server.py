"""The Prefect server for schedules: the configured one, or one that kshot starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

import httpx
import prefect
from filelock import FileLock, Timeout
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_API_PORT, PREFECT_UI_URL, temporary_settings

from kshot_flows import project
from kshot_flows.console import progress
from kshot_flows.run import child, embedded
from kshot_runtime.errors import KshotError

_START_SECONDS = 120
_END_SECONDS = 3


class Server:
    """The configured server; or else the project's own, a child of one schedule, restarted by another if that ends.

    It shares the database of `kshot run`, so its pages show every run. It reuses its port if possible, and
    `.kshot/prefect-server.json` names it.
    """

    def __init__(self) -> None:
        self.configured = embedded.configured()
        self.url: str = PREFECT_API_URL.value() or ""
        self._folder = project.home() / ".kshot"
        self._record = self._folder / "prefect-server.json"
        # held by the process that runs the server
        self._turn = FileLock(self._folder / "prefect-server.lock", thread_local=False)
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        """A client of the server."""
        with temporary_settings({PREFECT_API_URL: self.url}), get_client(sync_client=True) as client:
            yield client

    def page(self, place: str, number: UUID) -> str:
        """The URL of a page, such as `runs/flow-run` with an id."""
        pages = PREFECT_UI_URL.value() if self.configured else None
        return f"{(pages or self.url.removesuffix('/api')).rstrip('/')}/{place}/{number}"

    def runs(self) -> bool:
        """Whether the server answers."""
        if not self.configured and self._process is None:
            self.url = self._elsewhere()
        return bool(self.url) and _answers(self.url)

    def ensure(self) -> None:
        """Make sure that a server answers: start the project's own, unless another process runs it."""
        if self.configured:
            with embedded.api():  # an error if it does not answer
                return
        self._folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _START_SECONDS
        if self._process is not None and self._process.poll() is not None:
            self.close()
        while not self.runs():
            if self._process is None:
                with suppress(Timeout):
                    self._turn.acquire(timeout=0)
                    self._start()
            elif self._process.poll() is not None or time.monotonic() > deadline:
                raise KshotError(
                    f"Prefect's server did not start. What it said is in {self._folder / 'prefect-server.log'}"
                )
            time.sleep(0.2)

    def close(self) -> None:
        """End the server, if this process started it."""
        if self._process is not None:
            child.end(self._process, _END_SECONDS)
            self._process = None
            self._turn.release()

    def _elsewhere(self) -> str:
        """The URL of the project's own server, if another process runs it."""
        if not self._record.exists():
            return ""
        try:
            with self._turn.acquire(timeout=0):
                return ""
        except Timeout:
            return str(self._recorded().get("url", ""))

    def _recorded(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return dict(json.loads(self._record.read_text()))
        return {}

    def _start(self) -> None:
        port = _free_port(self._recorded().get("port", 0), PREFECT_SERVER_API_PORT.value(), 0)
        self.url = f"http://127.0.0.1:{port}/api"
        progress.say(f"Starting Prefect's server, with its pages at http://127.0.0.1:{port}")
        self._record.write_text(json.dumps({"url": self.url, "port": port}))
        pages = {}
        if not os.access(prefect.__module_path__ / "server", os.W_OK):  # folder to which it copies its pages
            pages = {"PREFECT_SERVER_UI_STATIC_DIRECTORY": str(self._folder / "prefect-pages")}
        environment = {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{self._folder / 'prefect.db'}",
            "PREFECT_SERVER_API_HOST": "127.0.0.1",
            "PREFECT_SERVER_API_PORT": str(port),  # with the option --port, its pages would use the default port
            "PREFECT_UI_URL": f"http://127.0.0.1:{port}",  # in notifications
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        }
        # Create the tables in one process at a time.
        with FileLock(self._folder / "prefect.lock"), (self._folder / "prefect-server.log").open("wb") as log:
            self._process = child.start("server", environment={**environment, **pages}, output=log)
            while self._process.poll() is None and not _answers(self.url):
                time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _free_port(*wanted: int) -> int:
    for port in wanted:
        with socket.socket() as tried, suppress(OSError):
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("127.0.0.1", port))
            return int(tried.getsockname()[1])
    raise KshotError("no port of this machine is free")
