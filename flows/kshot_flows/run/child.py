"""Child processes (a flow run, or Prefect's server) that end with their parent."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any
from uuid import UUID

_MODULE = "kshot_flows.cli.child"  # calls `main`


def start(*what: str, environment: Mapping[str, str], output: IO[Any] | None = None) -> subprocess.Popen[bytes]:
    """Start `server`, or `run` with the id of a flow run, in a new session, so that Ctrl-C is handled by the parent."""
    return subprocess.Popen(
        [sys.executable, "-m", _MODULE, str(os.getpid()), *what],
        env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Terminate a process, and kill its process group if it has not ended after `seconds`."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tie_to(parent: int) -> None:
    """End this process as soon as `parent` has ended, even by a kill."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)

    def watch() -> None:  # on other systems, and if the parent has already ended
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main(sentence: Callable[[BaseException], str]) -> None:
    """The child's entry point; `sentence` converts an error to a message."""
    _tie_to(int(sys.argv[1]))
    _run(UUID(sys.argv[3]), sentence) if sys.argv[2] == "run" else _serve()


def _run(flow_run: UUID, sentence: Callable[[BaseException], str]) -> None:
    from prefect import get_client
    from prefect.exceptions import Abort, TerminationSignal
    from prefect.flow_engine import run_flow

    from kshot_flows.pipeline import pipeline

    logging.raiseExceptions = False  # else it prints log records that it could not send to a server
    sys.argv = ["kshot", "schedules"]  # messages that suggest a look name this command
    try:
        with get_client(sync_client=True) as client:
            found = client.read_flow_run(flow_run)
        asked: dict[str, Any] = {"changes": None, **found.parameters}
        # messages that suggest a repetition name this one
        sys.argv = ["kshot", "run", asked["recipe"], *(asked["changes"] or [])]
        run_flow(pipeline, flow_run=found)
    except Abort:  # the run was cancelled
        pass
    except TerminationSignal:
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:  # the traceback is on the run's page
        sys.exit(sentence(error))


def _serve() -> None:
    from prefect.cli import app

    sys.argv = ["prefect", "server", "start"]
    app()
