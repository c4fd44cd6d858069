"""Inject faults into each step of `kshot run`, and check the error message and the result of the next run.

    python bench/faults.py                          # every fault at every step, an hour or two
    python bench/faults.py full prefect-killed@export torn@schedule

A case passes if the run ends with one error message (or is killed), and the same command then ends with status 0, with
the learner and the ONNX files of a run without faults to the byte, one version, in production, audit, stage and alias
consistent, and no MLflow run RUNNING. `torn` kills the run and truncates the newest file from which the step resumes.
At `schedule` the fault hits a run of `kshot schedule --every 5s` and is removed once that run has ended (or a minute
later); then a run of the same schedule has to complete, and SIGTERM has to end it with status 0.
`full` mounts a tmpfs, so it needs root; `clock` needs Linux and a C compiler.
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
from threading import Thread

import numpy as np

STEPS = ("meta_train", "evaluate", "export", "register", "promote")
FAULTS = (
    "killed", "terminated", "full", "mlflow-killed", "mlflow-hung", "prefect-killed", "prefect-hung", "moved", "twice",
    "clock", "torn",
)  # fmt: skip
SCHEDULED = ("full", "torn", "damaged", "mlflow-killed", "clock", "moved")  # faults that are tested under a schedule
MARKS = {"meta_train": "step 200/400"}  # the output line at which the fault is injected; else the step's name
TORN = {"meta_train": "last.pt", "evaluate": "learner.pt", "export": "scores*.npz", "register": "bundle-*/*.onnx",
        "promote": "*.evidence.json", "schedule": "last.pt"}  # fmt: skip
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

CLOCK = """
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec -= 86400;
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec, now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    return now ? *now = exact.tv_sec : exact.tv_sec;
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about = f"{', '.join(FAULTS)}; at one step of {', '.join(STEPS)}, schedule, or at each"
    parser.add_argument("faults", nargs="*", default=(*FAULTS, "damaged"), metavar="FAULT[@STEP]", help=about)
    asked = [each.partition("@") for each in parser.parse_args().faults]
    with tempfile.TemporaryDirectory(prefix="kshot-faults-") as place:
        first = project(Path(place) / "sound")
        assert run(first).returncode == 0
        sound = bits(first)
        rows = []
        for fault, _, only in asked:
            steps = (STEPS if fault in FAULTS else ()) + (("schedule",) if fault in SCHEDULED else ())
            for step in [only] if only else steps:
                row = (scheduled if step == "schedule" else cell)(Path(place), fault, step, sound)
                rows.append(row)
                print(" | ".join(row), flush=True)
    out = Path(__file__).parent / "results" / "faults.md"
    head = ["fault", "at", "status", "seconds", "last line", "the next run"]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    kept = out.read_text() if out.exists() else "# Faults in the middle of `kshot run`: bench/faults.py\n"
    out.write_text(f"{kept}\n{datetime.now():%Y-%m-%d %H:%M}\n\n" + "\n".join(lines) + "\n")


def project(home: Path) -> Path:
    """A project in git and DVC, with a recipe and a data set of noisy 16 x 16 patterns."""
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


def kshot(home: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "KSHOT_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}
    command = [sys.executable, "-c", "from kshot_flows.cli.main import main; main()", *arguments]
    return subprocess.Popen(
        command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def run(home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    process = kshot(home, "run", "tiny.toml", **more)
    shown, _ = process.communicate(timeout=900)
    return subprocess.CompletedProcess([], process.returncode, shown)


def bits(home: Path) -> dict[str, str]:
    """sha256 of the learner file and of the ONNX graphs."""
    files = [*home.glob("runs/tiny/*/learner.pt"), *home.glob("runs/tiny/*/bundle-*/*.onnx")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def prepare(
    place: Path, fault: str, step: str
) -> tuple[Path, dict[str, str], Server | None, list[Callable[[], object]]]:
    """A project for a fault, its environment and server, and a cleanup function."""
    home, undo, more, server = place / f"{fault}-{step}", list[Callable[[], object]](), dict[str, str](), None
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
    return home, more, server, undo


def cell(place: Path, fault: str, step: str, sound: dict[str, str]) -> list[str]:
    home, more, server, undo = prepare(place, fault, step)
    began = time.monotonic()
    process = kshot(home, "run", "tiny.toml", **more)
    others, shown, done = list[subprocess.Popen[str]](), list[str](), False
    assert process.stdout is not None
    for line in process.stdout:
        shown.append(line.strip())
        if not done and (line.strip().startswith(MARKS.get(step, step)) if step in MARKS else line.strip() == step):
            done = True
            if fault in ("killed", "terminated", "moved", "clock", "torn"):
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
    if fault == "torn":
        tear(home, step)
    if fault == "moved":
        home = home.rename(home.with_name(f"{home.name} elsewhere"))
    if server is not None:
        server.signal(signal.SIGCONT) if fault.endswith("hung") else server.start()
    if fault == "clock":
        more |= a_day_ago(place)
    again = run(home, **more)
    wrong = judge(home, again, more, bits(home) == sound)
    if any("Traceback" in text for text in ("\n".join(shown), again.stdout, *others_end)):
        wrong.append("a traceback was shown")
    if any(other.returncode for other in others):
        wrong.append("the second run failed")
    for each in undo:
        each()
    last = next((line for line in reversed(shown) if line), "") if status > 0 else ""
    return [fault, step, str(status), f"{seconds:.0f}", last.replace("|", "/"), "; ".join(wrong) or "right"]


def scheduled(place: Path, fault: str, step: str, sound: dict[str, str]) -> list[str]:
    """Inject a fault into a run of `kshot schedule` at `step 200/400`, remove it, and check a later run."""
    home, more, server, undo = prepare(place, fault, step)
    more |= {"PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    images = home / "data" / "patterns" / "images.npy"
    if fault == "damaged":
        images.write_bytes(images.read_bytes()[:-1] + bytes([images.read_bytes()[-1] ^ 1]))

    def serve() -> tuple[subprocess.Popen[str], list[str]]:
        lines = list[str]()
        process = kshot(home, "schedule", "tiny.toml", "--every", "5s", **more)
        assert process.stdout is not None
        Thread(target=lambda: lines.extend(line.strip() for line in process.stdout or ()), daemon=True).start()
        undo.append(process.kill)
        return process, lines

    def heard(lines: list[str], *texts: str, seconds: float = 120) -> bool:
        deadline = time.monotonic() + seconds
        while not any(text in line for text in texts for line in lines):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    began = time.monotonic()
    process, shown = serve()
    lines = shown
    ended = ("Failed after", "Crashed after")
    assert heard(shown, *(ended if fault == "damaged" else ["step 200/400"])), "\n".join(shown)
    if fault == "full":
        fill(home / "filler")
        heard(shown, *ended, seconds=60)
        (home / "filler").unlink()
    elif fault == "torn":
        subprocess.run(
            ["pkill", "-KILL", "-P", str(process.pid), "-f", r"kshot_flows.cli.child [0-9]+ run"], check=True
        )
        tear(home, step)
    elif fault == "damaged":
        pulled = kshot(home, "data", "pull", "patterns")
        assert pulled.wait() == 0, pulled.stdout
    elif server is not None:
        server.signal(signal.SIGKILL)
        heard(shown, *ended)
        server.start()
    elif fault == "clock":
        process.kill()
        process.wait()
        time.sleep(3)  # its children end with it
        more |= a_day_ago(place)
        process, lines = serve()
    elif fault == "moved":
        process.terminate()
        process.wait()
        home = home.rename(home.with_name(f"{home.name} elsewhere"))
        process, lines = serve()
    right = heard(lines, "Completed after", seconds=180)
    process.terminate()
    status, seconds = process.wait(60), time.monotonic() - began
    last = next((line for line in lines if any(text in line for text in ended)), "")
    again = subprocess.CompletedProcess([], status, "\n".join(lines))
    wrong = [] if right else [f"no run completed: {' / '.join(lines[-5:])}"]
    wrong += judge(home, again, more, bits(home) == sound)
    wrong += ["a traceback was shown"] if "Traceback" in again.stdout else []
    for each in reversed(undo):
        each()
    return [fault, step, str(status), f"{seconds:.0f}", last.replace("|", "/"), "; ".join(wrong) or "right"]


def tear(home: Path, step: str) -> None:
    """Truncate the newest file from which a step resumes to half its size."""
    torn = max(home.glob(f"runs/tiny/*/{TORN[step]}"), key=lambda file: file.stat().st_mtime)
    os.truncate(torn, torn.stat().st_size // 2)


def judge(home: Path, again: subprocess.CompletedProcess[str], more: dict[str, str], same: bool) -> list[str]:
    """The problems found after the next run."""
    state = subprocess.run(
        [sys.executable, "-c", STATE], cwd=home, env={**os.environ, **more, "KSHOT_HOME": str(home)},
        capture_output=True, text=True,
    )  # fmt: skip
    wrong = [] if again.returncode == 0 else [f"status {again.returncode}: {again.stdout.strip().splitlines()[-1]}"]
    found = json.loads(state.stdout.partition("STATE ")[2] or "{}")
    if not found:
        return [*wrong, state.stderr.strip()[-300:]]
    if found["versions"] != [[1, "Production", ["production"]]]:
        wrong.append(f"versions {found['versions']}")
    wrong += found["disagreements"]
    wrong += [f"{found['running']} runs RUNNING"] if found["running"] else []
    left = [kind for kind in found["left"] if kind != "damaged checkpoint"]  # kept for inspection
    wrong += [f"left: {', '.join(left)}"] if left else []
    return wrong if same else [*wrong, "other bits"]


def a_day_ago(place: Path) -> dict[str, str]:
    """An environment whose wall clock is a day back, but not `time.monotonic` (faketime would change both)."""
    library = place / "clock.so"
    compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(compiler, input=CLOCK, text=True, check=True)
    return {"LD_PRELOAD": str(library)}


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
