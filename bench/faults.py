"""Faults in the middle of `kshot run`, each at each step: what is said, and whether the next run is right.

    python bench/faults.py                          # every fault at every step, about an hour
    python bench/faults.py full prefect-killed@export

A cell is right if the run ends by itself with one sentence (or is killed), and the same command then ends with status
0, with the learner and the ONNX files of a run without faults to the byte, one version, in production, audit, stage and
alias in agreement, and no MLflow run RUNNING. `full` mounts a tmpfs, so it needs root; `clock` needs faketime.
Results go to bench/results/faults.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import numpy as np

STEPS = ("meta_train", "evaluate", "export", "register", "promote")
FAULTS = (
    "killed", "terminated", "full", "mlflow-killed", "mlflow-hung", "prefect-killed", "prefect-hung", "moved", "twice",
    "clock",
)  # fmt: skip
MARKS = {"meta_train": "step 200/400"}  # the line of output at which the fault comes; else the step's name
RECIPE = """
name = "tiny"
dataset = { name = "patterns" }
backbone = { name = "conv4", width = 8 }
learner = { name = "protonet" }
evaluation = { ways = [3], shots = [1], queries = 3, episodes = 60 }
[training]
ways = 5
shots = 1
queries = 3
steps = 400
lr = 3e-3
validate_every = 100
validation_ways = 3
validation_queries = 3
validation_episodes = 20
"""
STATE = """
import json
from kshot_flows import registry
from kshot_flows.run import leftovers
from kshot_flows.tracking import stores
versions = registry.versions("tiny")
print("STATE " + json.dumps({
    "versions": [[v.version, str(v.stage), list(v.aliases)] for v in versions],
    "disagreements": registry.disagreements("tiny"),
    "left": sorted(each.kind for each in leftovers.find()),
    "running": sum(run.info.status == "RUNNING" for run in stores.client().search_runs(
        [e.experiment_id for e in stores.client().search_experiments()])),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about = f"{', '.join(FAULTS)}; at one step of {', '.join(STEPS)}, or at each"
    parser.add_argument("faults", nargs="*", default=FAULTS, metavar="FAULT[@STEP]", help=about)
    asked = [each.partition("@") for each in parser.parse_args().faults]
    with tempfile.TemporaryDirectory(prefix="kshot-faults-") as place:
        first = project(Path(place) / "sound")
        assert run(first).returncode == 0
        sound = bits(first)
        rows = []
        for fault, _, only in asked:
            for step in [only] if only else STEPS:
                row = cell(Path(place), fault, step, sound)
                rows.append(row)
                print(" | ".join(row), flush=True)
    out = Path(__file__).parent / "results" / "faults.md"
    head = ["fault", "at", "status", "seconds", "last line", "the next run"]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    kept = out.read_text() if out.exists() else "# Faults in the middle of `kshot run`: bench/faults.py\n"
    out.write_text(f"{kept}\n{datetime.now():%Y-%m-%d %H:%M}\n\n" + "\n".join(lines) + "\n")


def project(home: Path) -> Path:
    """A folder with a recipe and 16 x 16 patterns under noise to learn from, in git and DVC."""
    from PIL import Image

    random, photos = np.random.default_rng(0), home / "photos"
    for split, count in (("train", 10), ("val", 6), ("test", 6)):
        for name in range(count):
            pattern = np.kron(random.integers(0, 256, (4, 4)), np.ones((4, 4)))  # (16, 16)
            (photos / split / f"{split}-{name}").mkdir(parents=True)
            for number in range(8):
                noisy = np.clip(pattern + random.normal(0, 100, (16, 16)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(photos / split / f"{split}-{name}" / f"{number}.png")
    (home / "tiny.toml").write_text(RECIPE)
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=home, check=True, capture_output=True)
    imported = kshot(home, "data", "import", "photos", "patterns", "--size", "16", "--channels", "1")
    assert imported.wait() == 0, imported.stdout.read()
    return home


def kshot(home: Path, *arguments: str, before: tuple[str, ...] = (), **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "KSHOT_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}
    command = [*before, sys.executable, "-c", "from kshot_flows.cli.main import main; main()", *arguments]
    return subprocess.Popen(
        command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def run(home: Path, before: tuple[str, ...] = (), **more: str) -> subprocess.CompletedProcess[str]:
    process = kshot(home, "run", "tiny.toml", before=before, **more)
    shown, _ = process.communicate(timeout=900)
    return subprocess.CompletedProcess([], process.returncode, shown)


def bits(home: Path) -> dict[str, str]:
    """sha256 of the learner and of the graphs."""
    files = [*home.glob("runs/tiny/*/learner.pt"), *home.glob("runs/tiny/*/bundle-*/*.onnx")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def cell(place: Path, fault: str, step: str, sound: dict[str, str]) -> list[str]:
    home, undo = place / f"{fault}-{step}", list[Callable[[], object]]()
    more: dict[str, str] = {}
    server = None
    if fault == "full":
        home.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", home], check=True)
        undo.append(lambda: subprocess.run(["umount", "-l", home], check=True))
    shutil.copytree(
        place / "sound", home, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", "mlflow", ".kshot")
    )
    if fault.startswith(("mlflow", "prefect")):
        server = Server(place / f"{fault}-{step}-server", fault.partition("-")[0])
        more = server.settings
        undo.append(server.kill)
    before = ("faketime", "-f", "+0d") if fault == "clock" else ()
    began = time.monotonic()
    process = kshot(home, "run", "tiny.toml", before=before, **more)
    others, shown, done = list[subprocess.Popen[str]](), list[str](), False
    assert process.stdout is not None
    for line in process.stdout:
        shown.append(line.strip())
        if not done and (line.strip().startswith(MARKS.get(step, step)) if step in MARKS else line.strip() == step):
            done = True
            if fault in ("killed", "terminated", "moved", "clock"):
                process.send_signal(signal.SIGTERM if fault == "terminated" else signal.SIGKILL)
            elif fault == "full":
                fill(home / "filler")
            elif fault == "twice":
                others.append(kshot(home, "run", "tiny.toml"))
            elif server is not None:
                server.signal(signal.SIGSTOP if fault.endswith("hung") else signal.SIGKILL)
    status, seconds = process.wait(), time.monotonic() - began
    others_end = [other.communicate()[0] for other in others]
    assert done, "\n".join(shown)
    if fault == "full":
        (home / "filler").unlink()
    if fault == "moved":
        home = home.rename(home.with_name(f"{home.name} elsewhere"))
    if server is not None:
        server.signal(signal.SIGCONT) if fault.endswith("hung") else server.start()
    again = run(home, ("faketime", "-f", "-1d") if fault == "clock" else (), **more)
    state = subprocess.run(
        [sys.executable, "-c", STATE], cwd=home, env={**os.environ, **more, "KSHOT_HOME": str(home)},
        capture_output=True, text=True,
    )  # fmt: skip
    wrong = judge(again, state, bits(home) == sound)
    if any("Traceback" in text for text in ("\n".join(shown), again.stdout, *others_end)):
        wrong.append("a traceback was shown")
    if any(other.returncode for other in others):
        wrong.append("the second run failed")
    for each in undo:
        each()
    last = next((line for line in reversed(shown) if line), "") if status > 0 else ""
    return [fault, step, str(status), f"{seconds:.0f}", last.replace("|", "/"), "; ".join(wrong) or "right"]


def judge(again: subprocess.CompletedProcess[str], state: subprocess.CompletedProcess[str], same: bool) -> list[str]:
    """What is wrong after the next run."""
    wrong = [] if again.returncode == 0 else [f"status {again.returncode}: {again.stdout.strip().splitlines()[-1]}"]
    found = json.loads(state.stdout.partition("STATE ")[2] or "{}")
    if not found:
        return [*wrong, state.stderr.strip()[-300:]]
    if found["versions"] != [[1, "Production", ["production"]]]:
        wrong.append(f"versions {found['versions']}")
    wrong += found["disagreements"]
    wrong += [f"{found['running']} runs RUNNING"] if found["running"] else []
    wrong += [f"left: {', '.join(found['left'])}"] if found["left"] else []
    return wrong if same else [*wrong, "other bits"]


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(1 << 16))


class Server:
    """An MLflow or a Prefect server that can be stopped, killed and started again."""

    def __init__(self, folder: Path, kind: str) -> None:
        folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, url = folder, f"http://127.0.0.1:{port}"
        if kind == "mlflow":
            store = [f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
            self.command = ["mlflow", "server", "--port", str(port), "--workers", "1", "--backend-store-uri", *store]
            self.settings, self.health = {"MLFLOW_TRACKING_URI": url}, f"{url}/health"
        else:
            self.command = ["prefect", "server", "start", "--host", "127.0.0.1"]
            self.settings, self.health = {"PREFECT_API_URL": f"{url}/api"}, f"{url}/api/health"
        self.environment = {
            **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
            "PREFECT_HOME": str(folder), "PREFECT_SERVER_API_PORT": str(port), "DO_NOT_TRACK": "true",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }  # fmt: skip
        self.start()

    def start(self) -> None:
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command], env=self.environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        for _ in range(1200):
            with suppress(OSError), urllib.request.urlopen(self.health, timeout=2):
                return
            time.sleep(0.1)
        raise RuntimeError((self.folder / "log").read_text()[-2000:])

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGCONT), self.signal(signal.SIGKILL)
        self.process.wait()


if __name__ == "__main__":
    main()
