"""Throughput of the server's engine compared with a bare loop over InferenceSession.run, and of its settings.

    python bench/serve_engine.py [--rounds 9] [--size 28] [--width 64]

Contenders alternate within each round, so that other load affects all of them; ratios are computed per round, of
which the median and the middle half are printed. Weights are untrained, which does not affect the time. No image is
decoded. Writes bench/results/serve_engine.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from serving_load import arguments, build, write

from kshot_runtime.bundle import Bundle
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champion import Champion
from kshot_serve.models.cores import cores
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import EngineSettings

LEARNERS: dict[str, dict[str, int]] = {"protonet": {}, "maml": {"steps": 5}}
WAYS, SHOTS, BATCH, CLIENTS = 5, 5, 32, 96
SETTINGS = EngineSettings()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each contender in a round")
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            name: build(name, Path(folder) / name, size=options.size, width=options.width, **settings)
            for name, settings in LEARNERS.items()
        }
        found = {
            "what": f"conv4-{options.width}, {options.size}x{options.size}x1, {WAYS}-way {SHOTS}-shot, CPU, "
            f"{cores()} threads",
            "rounds": options.rounds,
            "saturation": [saturation(name, path, options) for name, path in paths.items()],
            "session_options": session_options(paths["protonet"] / "embed.onnx", options),
            "runners": runners(paths["protonet"], options),
        }
    write("serve_engine", found)


def saturation(name: str, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Single images from many closed-loop clients, compared with full batches in a bare loop."""
    bundle = Engine(SETTINGS, Metrics()).open(path)
    model, graphs = Champion(bundle, bundle.manifest.id, name, "0", ""), bundle.graphs
    images = np.random.default_rng(0).integers(0, 256, (CLIENTS, 1, options.size, options.size), np.uint8)
    support, labels, classes = images[: WAYS * SHOTS], np.arange(WAYS).repeat(SHOTS), np.arange(WAYS)
    state: dict[str, np.ndarray] = {}
    if not graphs.takes_features:
        state = graphs.adapt(support, labels, classes, bundle.manifest.steps_for(SHOTS))

    async def ask(engine: Engine, image: np.ndarray) -> object:
        if graphs.takes_features:
            return await engine.embed(model, image, time.monotonic() + 5)
        return await engine.classify(model, state, "space", image, time.monotonic() + 5)

    def bare(session: onnxruntime.InferenceSession) -> float:
        given = {**state, "images" if graphs.takes_features else "query": images[:BATCH]}
        ran, started = 0, time.perf_counter()
        while time.perf_counter() < started + options.seconds:
            session.run(None, given)
            ran += BATCH
        return ran / (time.perf_counter() - started)

    graph = path / ("embed.onnx" if graphs.takes_features else "classify.onnx")
    tuned = session_with(graph, cores(), arena=True, spinning=False)
    plain = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    contenders = {
        f"bare loop, {cores()} threads": lambda: bare(tuned),
        "bare loop, onnxruntime's defaults": lambda: bare(plain),
        "engine": rate_of(SETTINGS, images, ask, options),
    }
    return compare(f"saturation, {name}", contenders, options.rounds)


def rate_of(
    settings: EngineSettings, images: np.ndarray, ask: Callable[..., Any], options: argparse.Namespace
) -> Callable[[], float]:
    """Images per second of an engine at saturation."""

    async def whole() -> float:
        engine = Engine(settings, Metrics())
        await engine.start()
        end, started = time.perf_counter() + options.seconds, time.perf_counter()

        async def client(i: int) -> int:
            answered = 0
            while time.perf_counter() < end:
                with engine.admit(1):
                    await ask(engine, images[i : i + 1])
                answered += 1
            return answered

        answered = sum(await asyncio.gather(*[client(i) for i in range(CLIENTS)]))
        rate = answered / (time.perf_counter() - started)
        await engine.stop()
        return rate

    return lambda: asyncio.run(whole())


def session_options(path: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare onnxruntime settings in two runners: rate relative to the first, and CPU time."""
    random = np.random.default_rng(0)
    found = []
    for size in (1, 8, BATCH):
        images = random.integers(0, 256, (size, 1, options.size, options.size), np.uint8)
        contenders = {}
        for threads, arena, spinning in itertools.product(sorted({1, cores()}), (False, True), (False, True)):
            if threads == 1 and spinning:
                continue  # no threads that spin
            session = session_with(path, threads, arena, spinning)
            name = f"threads {threads}, arena {'on' if arena else 'off'}, spinning {'on' if spinning else 'off'}"
            contenders[name] = lambda session=session, images=images: two_loops(session, images, options.seconds / 2)
        found.append(compare(f"session options, batches of {size}", contenders, options.rounds))
    return found


def session_with(path: Path, threads: int, arena: bool, spinning: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def two_loops(session: onnxruntime.InferenceSession, images: np.ndarray, seconds: float) -> float:
    ran = [0, 0]
    end, started = time.perf_counter() + seconds, time.perf_counter()

    def loop(i: int) -> None:
        while time.perf_counter() < end:
            session.run(["features"], {"images": images})
            ran[i] += len(images)

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(ran) / (time.perf_counter() - started)


def runners(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare numbers of concurrent runs and of threads per run."""
    images = np.random.default_rng(0).integers(0, 256, (CLIENTS, 1, options.size, options.size), np.uint8)
    contenders = {}
    for count, threads in itertools.product((1, 2, 3), sorted({1, cores()})):
        bundle = Bundle.open(path, threads=threads, arena=True)
        model = Champion(bundle, bundle.manifest.id, "bench", "0", "")

        async def ask(engine: Engine, image: np.ndarray, model: Champion = model) -> object:
            return await engine.embed(model, image, time.monotonic() + 5)

        contenders[f"{count} runners of {threads} threads"] = rate_of(
            EngineSettings(runners=count, threads=threads), images, ask, options
        )
    return compare("runners", contenders, options.rounds)


def compare(what: str, contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Rates of contenders, alternating; ratios to the first in the same round. CPU seconds are of the whole process."""
    for contender in contenders.values():
        contender()
    measured = np.array([[measure(contender) for contender in contenders.values()] for _ in range(rounds)])
    rates, costs = measured[:, :, 0], measured[:, :, 1]  # (rounds, contenders)
    rows = []
    for i, name in enumerate(contenders):
        low, middle, high = np.percentile(rates[:, i] / rates[:, 0], [25, 50, 75])
        rate, cost = float(np.median(rates[:, i])), float(np.median(costs[:, i]))
        print(f"{what:36} {name:40} {rate:8.0f} images/s, {middle:5.2f} of the first ({low:.2f} to {high:.2f}), "
              f"{1e6 * cost:6.0f} us of processor an image", flush=True)  # fmt: skip
        rows.append(
            {
                "name": name,
                "images_per_second": round(rate),
                "ratio": round(float(middle), 3),
                "ratio_middle_half": [round(float(low), 3), round(float(high), 3)],
                "processor_us_per_image": round(1e6 * cost),
            }
        )
    return {"what": what, "rows": rows}


def measure(contender: Callable[[], float]) -> Iterable[float]:
    wall, processor = time.perf_counter(), time.process_time()
    rate = contender()
    return rate, (time.process_time() - processor) / (rate * (time.perf_counter() - wall))


if __name__ == "__main__":
    main()
