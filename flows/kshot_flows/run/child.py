"""A process that ends with the one that started it: a flow run, or Prefect's server.

python -m kshot_flows.run.child PARENT run FLOW_RUN
python -m kshot_flows.run.child PARENT server
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO, Any
from uuid import UUID


def start(*what: str, environment: Mapping[str, str], output: IO[Any] | None = None) -> subprocess.Popen[bytes]:
    """Start this module. In a session of its own, so that Ctrl-C reaches it through us, in order."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid()), *what],
        env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask a process to end, and kill it with all that it started if it has not done so after `seconds`."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tie_to(parent: int) -> None:
    """End this process as soon as `parent` has ended, however that ended."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)

    def watch() -> None:  # on other systems, and for a parent that has ended already
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _run(flow_run: UUID) -> None:
    from prefect import get_client
    from prefect.exceptions import Abort, TerminationSignal
    from prefect.flow_engine import run_flow

    from kshot_flows.pipeline import pipeline
    from kshot_runtime.errors import KshotError

    logging.raiseExceptions = False  # or it prints what it could not send to a server that is away
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(flow_run)
    try:
        run_flow(pipeline, flow_run=found)
    except Abort:  # it was cancelled
        pass
    except TerminationSignal:
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:  # its traceback is on the run's page
        sys.exit(str(error) if isinstance(error, KshotError) else f"{type(error).__name__}: {error}")


def _serve() -> None:
    from prefect.cli import app

    sys.argv = ["prefect", "server", "start"]
    app()


if __name__ == "__main__":
    _tie_to(int(sys.argv[1]))
    _run(UUID(sys.argv[3])) if sys.argv[2] == "run" else _serve()
