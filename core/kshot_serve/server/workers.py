"""Several processes behind one port, each a whole server; what they share lies in the database and in the folder.

Python runs in one thread of a process at a time, so that one process answers so many small photos a second and no more,
whatever the machine. The parent starts the workers, tells when they are ready, replaces one that dies, and ends them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from kshot_runtime.errors import KshotError
from kshot_serve.observe import metrics as measured
from kshot_serve.observe.logs import configure_logs
from kshot_serve.server.listening import bind
from kshot_serve.settings import Settings

log = logging.getLogger("kshot.serve")

_PAUSE_S = 1.0  # before a worker that died is replaced
_BEYOND_DRAIN_S = 10.0  # a worker that has not ended by then is killed


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C. One line on standard output tells when all workers are ready, and where.

    A single worker is this very process.
    """
    say = partial(print, flush=True)  # who waits for it at the end of a pipe is to have it now
    if settings.workers == 1:
        from kshot_serve.server import run

        return run.serve(settings, say)
    if not hasattr(socket, "SO_REUSEPORT"):
        raise KshotError("processes cannot share a port on this system: leave --workers out")
    configure_logs(sys.stderr)
    bind(settings.host, settings.port).close()  # a port that is to be shared would be had beside another server's
    with bind(settings.host, settings.port, shared=True) as held, TemporaryDirectory(prefix="kshot-") as metrics:
        settings = settings.model_copy(update={"port": held.getsockname()[1]})
        asyncio.run(Workers(settings, Path(metrics), say).run())


class Workers:
    """The workers of a server, as their parent sees them."""

    def __init__(self, settings: Settings, metrics: Path, announce: Callable[[str], None]) -> None:
        self._settings = settings
        self._metrics = metrics
        self._announce = announce
        self._processes: set[asyncio.subprocess.Process] = set()
        self._ending = False

    async def run(self) -> None:
        main, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert main is not None

        def told(how: signal.Signals) -> None:
            if not self._ending:
                main.cancel()  # whatever it waits for
            self._end(how)

        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, told, each)
        count = self._settings.workers
        try:
            # One first: what is wrong with a model is told once, and the others find it fetched.
            line, first = await self._start()
            self._settings = self._settings.model_copy(update={"fill": ()})  # which it has done
            started = await asyncio.gather(*[self._start() for _ in range(count - 1)])
            self._announce(line.replace(" at http", f" by {count} workers at http"))
            await asyncio.gather(*[self._keep(process) for process in (first, *(process for _, process in started))])
        except asyncio.CancelledError:
            if not self._ending:
                raise
            main.uncancel()
        finally:
            self._end(signal.SIGTERM)
            await asyncio.gather(*map(self._gone, list(self._processes)))

    async def _start(self) -> tuple[str, asyncio.subprocess.Process]:
        """A worker that is ready, and what it says of itself."""
        command = [sys.executable, "-m", __name__]
        environment = os.environ | {measured.SHARED: str(self._metrics)}
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=environment, process_group=0
        )  # in a group of its own: a terminal's Ctrl-C is for the parent, which passes it on
        self._processes.add(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(self._settings.model_dump_json().encode() + b"\n")  # and stays open for as long as we live
        told = json.loads(await process.stdout.readline() or "{}")
        if "ready" not in told:
            code = await self._ended(process)
            raise KshotError(told.get("error") or f"a worker ended with {code} before it was ready; see the log")
        return told["ready"], process

    async def _keep(self, process: asyncio.subprocess.Process) -> None:
        """Replace a worker for as long as it dies."""
        while True:
            code = await self._ended(process)
            log.error("worker %d ended with %d; another takes its place", process.pid, code)
            while True:
                await asyncio.sleep(_PAUSE_S)
                try:
                    _, process = await self._start()
                    break
                except KshotError as error:
                    log.error("it does not start: %s", error)

    async def _ended(self, process: asyncio.subprocess.Process) -> int:
        """Its exit code; then it is forgotten, or its gauges would count for ever."""
        code = await process.wait()
        self._processes.discard(process)
        measured.forget(process.pid, self._metrics)
        return code

    def _end(self, how: signal.Signals) -> None:
        self._ending = True
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.send_signal(how)

    async def _gone(self, process: asyncio.subprocess.Process) -> None:
        try:
            await asyncio.wait_for(process.wait(), self._settings.drain_s + _BEYOND_DRAIN_S)
        except TimeoutError:
            log.error("worker %d does not end, and is killed", process.pid)
            process.kill()
            await process.wait()


def _work() -> None:
    """A worker: settings come in by standard input, one line goes out by standard output."""
    settings = Settings.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from kshot_serve.server import run

    say = partial(print, flush=True)
    try:
        run.serve(settings, lambda line: say(json.dumps({"ready": line})))
    except KshotError as error:
        say(json.dumps({"error": str(error)}))
        sys.exit(1)


def _end_with_parent() -> None:
    """A parent that was killed has told nobody, but its end of the pipe is closed."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _work()
