"""Throughput at saturation of the server over HTTP, a bare loop over InferenceSession.run, MLflow and LitServe.

    python bench/serve_throughput.py [--rounds 5] [--seconds 4] [--cases 28x1x1 84x3x1 84x3x8]

A case is the images' size, their channels, and the photos in each request.

All serve one bundle (ProtoNet on an untrained conv4-64, 5-way 5-shot) and alternate within each round; ratios are of
one round, of which the median counts. Clients are closed-loop; they run on the same processor, and their CPU time is
reported. Each server has one worker with all threads, or one per thread, and the faster of the two counts; likewise for
the bare loop and its threads. All servers get the same JPEG photos, as many per request: ours as raw or multipart
bodies, the others as base64 in JSON, which they require. To separate decoding, ours also gets decoded images (/v2,
binary), whose rate is compared with the bare loop; the rate on photos is compared with a bare loop that decodes.
LitServe uses its own batching (32 images, 5 ms), and is installed into a temporary virtual environment. Writes
bench/results/serve_throughput.json.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from serving_load import (
    arguments,
    bar,
    build,
    family,
    fill,
    form,
    milliseconds,
    photo,
    request,
    saturate,
    serving,
    write,
)

from kshot_runtime.bundle import Bundle
from kshot_runtime.images import ImageRule, decode
from kshot_serve.models.cores import cores

LITSERVE = "0.2.19"
PEERS = Path(__file__).parent / "peers"
WAYS, SHOTS, BATCH, FILES = 5, 5, 32, 64


@dataclass(frozen=True)
class Contender:
    """Classifies images for some seconds; returns images per second and CPU seconds per image."""

    name: str
    run: Callable[[float], dict[str, Any]]
    pid: int | None = None  # of the server process

    def turn(self, seconds: float) -> dict[str, Any]:
        """Run a contender, resumed only for this time: an idle server may poll and take CPU time from others."""
        self.wake()
        try:
            return self.run(seconds)
        finally:
            self.send(signal.SIGSTOP)

    def wake(self) -> None:
        self.send(signal.SIGCONT)

    def send(self, what: signal.Signals) -> None:
        for each in family(self.pid) if self.pid else ():
            os.kill(each, what)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each contender in a round")
    parser.add_argument("--cases", nargs="+", default=["28x1x1", "84x3x1", "84x3x8"])
    parser.add_argument("--clients", type=int, default=32, help="that send single photos; fewer send several, but 8")
    parser.add_argument("--only", nargs="+", help="contenders whose names begin so")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            "what": f"classify at saturation: ProtoNet on conv4-64, {WAYS}-way {SHOTS}-shot; {cores()} threads, the "
            "clients' too",
            "litserve": LITSERVE,
            "rounds": options.rounds,
            "seconds": options.seconds,
            "cases": [compare(case, Path(scratch), options) for case in options.cases],
        }
    found["bars"] = [each for row in found["cases"] for each in row.pop("bars")]
    write("serve_throughput", found, "mlflow")


def compare(case: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare all contenders on images of one size, with this number of photos per request."""
    size, channels, photos = map(int, case.split("x"))
    folder = scratch / case
    path = build("protonet", folder / "bundle", size=size, channels=channels)
    bundle = Bundle.open(path)
    rule = bundle.manifest.image

    def jpeg(way: int, shade: int) -> bytes:
        return photo(way, shade, size=size, channels=channels, kind="JPEG")

    files = [jpeg(i % WAYS, 100 + i) for i in range(FILES)]
    support = [jpeg(way, shot) for way in range(WAYS) for shot in range(SHOTS)]
    state = folder / "state.npz"
    bundle.adapt(support, np.arange(WAYS).repeat(SHOTS).tolist()).save(state)
    groups = [[files[(i + j) % FILES] for j in range(photos)] for i in range(FILES)]
    in_json = [[base64.b64encode(each).decode() for each in group] for group in groups]
    clients = max(options.clients // photos, 8)

    def asking(name: str, port: int, pid: int, requests: Sequence[bytes]) -> Contender:
        return Contender(name, loaded(port, pid, requests, clients, photos), pid)

    with ExitStack() as stack:
        contenders = []
        for workers in sorted({1, cores()}):
            many = f"{workers} worker{'s' * (workers > 1)}"
            contenders.append(Contender(f"bare loop, {many}", bare(path, [], workers)))
            contenders.append(Contender(f"bare loop that decodes, {many}", bare(path, files, workers)))
            server = stack.enter_context(serving(path, folder / f"ours-{workers}", "--workers", str(workers)))
            with server.client() as client:
                space = fill(client, WAYS, jpeg, SHOTS)
            tensors = [tensor_request(space, np.stack([decode(each, rule) for each in group])) for group in groups]
            contenders.append(asking(f"ours on decoded images, {many}", server.port, server.process.pid, tensors))
            bodies = [photos_request(space, group) for group in groups]
            contenders.append(asking(f"ours, {many}", server.port, server.process.pid, bodies))
            if wanted("mlflow", options):
                port, pid = stack.enter_context(with_mlflow(path, state, folder / f"mlflow-{workers}", workers))
                bodies = [json_request("/invocations", {"inputs": each}) for each in in_json]
                contenders.append(asking(f"mlflow models serve, {many}", port, pid, bodies))
            if wanted("litserve", options):
                python = litserve_at(scratch / "litserve")
                port, pid = stack.enter_context(with_litserve(python, path, state, folder, workers, photos))
                bodies = [json_request("/predict", {"photos": each}) for each in in_json]
                contenders.append(asking(f"LitServe, {many}", port, pid, bodies))
        what = {"case": case, "clients": clients, "decoding_ms": decoding(files, rule)}
        return what | judged(case, contenders, options)


def decoding(files: Sequence[bytes], rule: ImageRule) -> float:
    """Milliseconds to decode a photo on one thread."""
    began = time.perf_counter()
    for _ in range(10):
        for file in files:
            decode(file, rule)
    return round(100 * (time.perf_counter() - began) / len(files), 3)


def wanted(name: str, options: argparse.Namespace) -> bool:
    return not options.only or any(name.startswith(each) for each in options.only)


def judged(case: str, contenders: Sequence[Contender], options: argparse.Namespace) -> dict[str, Any]:
    """Run all contenders alternating, and compute the ratios with targets."""
    try:
        for contender in contenders:
            contender.turn(1.0)
        rounds = [[contender.turn(options.seconds) for contender in contenders] for _ in range(options.rounds)]
    finally:
        for contender in contenders:
            contender.wake()
    names = [contender.name for contender in contenders]
    rates = np.array([[each["rate"] for each in turn] for turn in rounds])  # (rounds, contenders)
    rows = []
    for i, name in enumerate(names):
        row = {"name": name, "images_per_second": round(float(np.median(rates[:, i])), 1)}
        for what in rounds[0][i].keys() - {"rate"}:
            row[what] = round(float(np.median([turn[i][what] for turn in rounds])), 3)
        rows.append(row)
        print(f"{case:7} {name:35}", *(f"{what} {value}" for what, value in row.items() if what != "name"), flush=True)

    def ratio(ours: str, theirs: str) -> float:
        return round(float(np.median(best(ours) / best(theirs))), 2)

    def best(whose: str) -> np.ndarray:
        """Rates per round, with the best number of workers over all rounds."""
        theirs = [i for i, name in enumerate(names) if name.startswith(f"{whose}, ")]
        found: np.ndarray = rates[:, max(theirs, key=lambda i: float(np.median(rates[:, i])))]
        return found

    bars = [
        ("ours on decoded images", "bare loop", 0.8),
        ("ours", "mlflow models serve", 5.0),
        ("ours", "LitServe", 1.0),
    ]
    return {
        "rows": rows,
        "photos_to_bare_loop_that_decodes": ratio("ours", "bare loop that decodes"),
        "bars": [
            bar(f"{case}: {ours} / {theirs}", figure, bound, figure >= bound)
            for ours, theirs, bound in bars
            if any(name.startswith(theirs) for name in names)
            for figure in [ratio(ours, theirs)]
        ],
    }


# Contenders --------------------------------------------------------------------------------------------------------


def bare(path: Path, files: Sequence[bytes], workers: int) -> Callable[[float], dict[str, Any]]:
    """Full batches in a loop, by workers that share the threads; files, if given, are decoded first.

    The workers are threads that run in parallel: onnxruntime and decoders release the GIL.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores() // workers
    session = onnxruntime.InferenceSession(path / "embed.onnx", options, providers=["CPUExecutionProvider"])
    rule = Bundle.open(path).manifest.image
    images = np.random.default_rng(0).integers(0, 256, (BATCH, *rule.shape), np.uint8)
    decoders, pool = ThreadPoolExecutor(cores()), ThreadPoolExecutor(workers)

    def work(until: float) -> int:
        ran = 0
        while time.perf_counter() < until:
            batch = images
            if files:
                parts = map if workers > 1 else decoders.map
                batch = np.stack(list(parts(lambda each: decode(each, rule), files[:BATCH])))
            session.run(None, {"images": batch})
            ran += BATCH
        return ran

    def run(seconds: float) -> dict[str, Any]:
        began, processor = time.perf_counter(), time.process_time()
        ran = sum(pool.map(work, [began + seconds] * workers))
        took = time.perf_counter() - began
        return {"rate": ran / took, "processor_ms_per_image": 1000 * (time.process_time() - processor) / ran}

    return run


def loaded(
    port: int, pid: int, requests: Sequence[bytes], clients: int, photos: int
) -> Callable[[float], dict[str, Any]]:
    """A server under closed-loop load."""

    def run(seconds: float) -> dict[str, Any]:
        began, own, theirs = time.perf_counter(), time.process_time(), processor_of(pid)
        sent = asyncio.run(saturate(port, requests, clients, seconds))
        took = time.perf_counter() - began
        bad = [each.reply for each in sent if each.reply.status not in (200, 429)]
        if bad:
            raise SystemExit(f"{len(bad)} of {len(sent)} requests were not answered, such as {bad[0]}")
        good = [each for each in sent if each.reply.status == 200]
        images = photos * len(good)
        return {
            "rate": images / took,
            "processor_ms_per_image": 1000 * (processor_of(pid) - theirs) / images,
            "clients_share_of_the_processor": (time.process_time() - own) / (took * cores()),
            "p50_ms": milliseconds([each.took for each in good])["p50"],
            "refused": 1 - len(good) / len(sent),
        }

    return run


def processor_of(pid: int) -> float:
    return sum(family(pid).values())


def tensor_request(space: str, images: np.ndarray) -> bytes:
    """A request with decoded images in the Open Inference Protocol's binary format."""
    data = images.tobytes()
    tensor = {
        "name": "images",
        "datatype": "UINT8",
        "shape": images.shape,
        "parameters": {"binary_data_size": len(data)},
    }
    asked = {"inputs": [tensor], "outputs": [{"name": name} for name in ("class", "probability", "decision")]}
    head = json.dumps(asked).encode()
    length = {"Inference_Header_Content_Length": str(len(head))}
    return request(f"/v2/models/{space}/infer", head + data, "application/octet-stream", **length)


def json_request(path: str, content: dict[str, Any]) -> bytes:
    return request(path, json.dumps(content).encode(), "application/json")


def photos_request(space: str, photos: Sequence[bytes]) -> bytes:
    return request(f"/v1/spaces/{space}/classify", *((photos[0], "image/jpeg") if len(photos) == 1 else form(photos)))


@contextmanager
def with_mlflow(bundle: Path, state: Path, folder: Path, workers: int) -> Iterator[tuple[int, int]]:
    """Start MLflow serving the bundle; its port and process."""
    import mlflow

    model, port = folder / "model", free_port()
    mlflow.pyfunc.save_model(
        model, python_model=str(PEERS / "with_mlflow.py"), artifacts={"bundle": str(bundle), "state": str(state)},
        model_config={"threads": cores() // workers}, pip_requirements=[],
    )  # fmt: skip
    given = {"-m": model, "-p": port, "-w": workers, "--env-manager": "local"}
    command = [str(Path(sys.executable).with_name("mlflow")), "models", "serve"]
    command += [str(word) for pair in given.items() for word in pair]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with peer(command, port, "/ping", folder / "log", path) as pid:
        yield port, pid


def litserve_at(folder: Path) -> Path:
    """The interpreter of an environment with LitServe and this environment's packages at the same versions."""
    python = folder / "bin" / "python"
    if not folder.exists():
        venv.create(folder, with_pip=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "kshot.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        subprocess.run([python, "-m", "pip", "install", "-q", f"litserve=={LITSERVE}"], check=True)
    return python


@contextmanager
def with_litserve(
    python: Path, bundle: Path, state: Path, folder: Path, workers: int, photos: int
) -> Iterator[tuple[int, int]]:
    port = free_port()
    given = (bundle, state, port, workers, max(1, cores() // workers), photos)
    command = [str(python), str(PEERS / "with_litserve.py"), *map(str, given)]
    with peer(command, port, "/health", folder / f"litserve-{workers}.log") as pid:
        yield port, pid


@contextmanager
def peer(
    command: list[str], port: int, health: str, log: Path, environment: dict[str, str] | None = None
) -> Iterator[int]:
    """Run a server for the block, and end it with its child processes."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=errors, stderr=errors, start_new_session=True, env=os.environ | (environment or {})
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{health}", timeout=1).close()
                break
            except OSError:
                if process.poll() is not None:
                    break
                time.sleep(0.5)
        else:
            process.kill()
        if process.poll() is not None:
            raise SystemExit(f"{command[0]} did not start:\n{log.read_text()[-2000:]}")
        yield process.pid
    finally:
        with suppress(ProcessLookupError):  # it may have already ended
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
