"""What every test shares: one torch thread (small tensors are twenty times faster), no telemetry, one Postgres."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

import kshot_flows  # noqa: F401  (first: it switches telemetry off)

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A Postgres of our own on a socket in a folder: no port, no password.

    The folder is none of pytest's. Each start of pytest, and some of our tests start it, shuts those to other users; a
    Postgres that runs as one of them looks after its folder every five minutes, and ends.
    """
    initdb, server = shutil.which("initdb"), shutil.which("postgres")
    if not initdb or not server:
        pytest.skip("this machine has no Postgres (initdb and postgres on the path)")
    become: list[str] = []
    if os.geteuid() == 0:  # which Postgres refuses
        if not shutil.which("runuser"):
            pytest.skip("Postgres does not run as root, and there is no runuser to become someone else")
        become = ["runuser", "-u", "nobody", "--"]
    with TemporaryDirectory(prefix="kshot-postgres-") as folder:
        home, data, log = Path(folder), Path(folder, "data"), Path(folder, "log")
        if become:
            shutil.chown(home, "nobody")
        made = subprocess.run(
            [*become, initdb, "-D", data, "-U", "kshot", "-A", "trust", "--no-sync"],
            capture_output=True, text=True, cwd=home,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        with log.open("w") as told:
            process = subprocess.Popen(
                [*become, server, "-D", data, "-k", home, "-c", "listen_addresses=", "-c", "fsync=off"],
                stdout=told, stderr=told, cwd=home, start_new_session=True,  # no signal meant for others reaches it
            )  # fmt: skip
        try:
            while "ready to accept connections" not in log.read_text():
                assert process.poll() is None, f"Postgres ended with {process.returncode}:\n{log.read_text()}"
                time.sleep(0.05)
            yield f"postgresql://kshot@/postgres?host={home}"
        finally:
            if (ended := process.poll()) is None:
                os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGINT)
                process.wait(30)
        assert ended is None, f"Postgres had ended by itself with {ended}, before the tests were:\n{log.read_text()}"
