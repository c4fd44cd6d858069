"""Several processes behind one socket, each a whole server; what they share lies in the database and in the folder.

Python runs in one thread of a process at a time, so that one process answers so many small photos a second and no more,
whatever the machine. The parent starts the workers, tells when they are ready, replaces one that dies, and ends them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory

from kshot_runtime.errors import KshotError
from kshot_serve.observe import metrics as measured
from kshot_serve.observe.logs import configure_logs
from kshot_serve.server.listening import listen
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
    if os.name == "nt":
        raise KshotError("processes cannot share a port on this system: leave --workers out")
    configure_logs(sys.stderr)
    with listen(settings.host, settings.port) as listener, TemporaryDirectory(prefix="kshot-") as metrics:
        asyncio.run(Workers(settings, listener, Path(metrics), say).run())


@dataclass
class Workers:
    """The workers of a server, as their parent sees them."""

    settings: Settings
    listener: socket
    metrics: Path
    announce: Callable[[str], None]
    processes: set[Process] = field(default_factory=set)

    async def run(self) -> None:
        """Until SIGTERM or Ctrl-C, which each worker gets too, or until the first worker cannot start: a KshotError."""
        loop, working = asyncio.get_running_loop(), asyncio.create_task(self._work())

        def told(how: signal.Signals) -> None:
            working.cancel()
            self._end(how)

        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, told, each)
        try:
            with suppress(asyncio.CancelledError):
                await working
        finally:
            self._end(signal.SIGTERM)
            await asyncio.gather(*map(self._gone, list(self.processes)))

    async def _work(self) -> None:
        # One first: what is wrong with a model is told once, and the others find it fetched.
        line, first = await self._start()
        self.settings = self.settings.model_copy(update={"fill": ()})  # which it has done
        started = await asyncio.gather(*[self._start() for _ in range(self.settings.workers - 1)])
        self.announce(line.replace(" at http", f" by {self.settings.workers} workers at http"))
        await asyncio.gather(self._keep(first), *[self._keep(process) for _, process in started])

    async def _start(self) -> tuple[str, Process]:
        """A worker that is ready, and what it says of itself."""
        shared = self.listener.fileno()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", __name__, str(shared), stdin=PIPE, stdout=PIPE, pass_fds=[shared],
            env=os.environ | {measured.SHARED: str(self.metrics)}, process_group=0,
        )  # fmt: skip
        # In a group of its own: a terminal's Ctrl-C is for the parent, which passes it on.
        self.processes.add(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(self.settings.model_dump_json().encode() + b"\n")  # and stays open for as long as we live
        told = json.loads(await process.stdout.readline() or "{}")
        if "ready" not in told:
            code = await self._ended(process)
            raise KshotError(told.get("error") or f"a worker ended with {code} before it was ready; see the log")
        return told["ready"], process

    async def _keep(self, process: Process) -> None:
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

    async def _ended(self, process: Process) -> int:
        """Its exit code; then it is forgotten, or its gauges would count for ever."""
        code = await process.wait()
        self.processes.discard(process)
        measured.forget(process.pid, self.metrics)
        return code

    def _end(self, how: signal.Signals) -> None:
        self.listener.close()  # or connections would wait here that nobody takes
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.send_signal(how)

    async def _gone(self, process: Process) -> None:
        try:
            await asyncio.wait_for(process.wait(), self.settings.drain_s + _BEYOND_DRAIN_S)
        except TimeoutError:
            log.error("worker %d does not end, and is killed", process.pid)
            process.kill()
            await process.wait()


def _worker() -> None:
    """A worker: settings come in by standard input, the socket by its number, one line goes out by standard output."""
    settings = Settings.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from kshot_serve.server import run

    say = partial(print, flush=True)
    try:
        run.serve(settings, lambda line: say(json.dumps({"ready": line})), socket(fileno=int(sys.argv[1])))
    except KshotError as error:
        say(json.dumps({"error": str(error)}))
        sys.exit(1)


def _end_with_parent() -> None:
    """A parent that was killed has told nobody, but its end of the pipe is closed."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _worker()
