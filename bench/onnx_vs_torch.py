"""Time to adapt and classify with a bundle's ONNX graphs compared with torch: same weights, images, and one thread.

    python bench/onnx_vs_torch.py [--rounds 15] [--size 28] [--width 64]

The two alternate within each round, so that other load affects both; the ratio of CPU times is computed per round,
and its median and middle half are printed. The graphs run as in the server: with a memory arena, and a
state with weights in its own session. Torch runs with default malloc, and again inside `kshot.malloc.kept`. Weights are
untrained, which does not affect the time. Writes bench/results/onnx_vs_torch.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from kshot.data.datasets import ClassImages
from kshot.data.episodes import Shape
from kshot.export import Facts, export
from kshot.malloc import kept
from kshot.recipe import LearnerSettings, PluginSettings, Recipe
from kshot_runtime.bundle import Bundle
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import Plugin

RESULTS = Path(__file__).parent / "results" / "onnx_vs_torch.json"
LEARNERS = {"protonet": {}, "maml": {"steps": 5}, "finetune": {}}
WAYS, SHOTS, QUERIES = 5, 5, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in LEARNERS for row in compare(name, options)]
    found = {
        "what": f"conv4-{options.width}, {options.size}x{options.size}x1, {WAYS}-way {SHOTS}-shot, one thread, CPU",
        "machine": machine(),
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        "rounds": options.rounds,
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\n{found['what']}; {found['machine']}. Written to {RESULTS}")


def compare(name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """Times of torch and onnxruntime, alternating, for adapting and for classifying many queries and one."""
    torch.manual_seed(0)
    image = (1, options.size, options.size)
    recipe = Recipe(
        name="bench",
        dataset={"name": "noise"},
        backbone=PluginSettings(name="conv4", width=options.width),
        learner=LearnerSettings(name=name, **LEARNERS[name]),
    )
    learner = recipe.build(image).eval()
    random = np.random.default_rng(0)
    noise = ClassImages.from_arrays([random.integers(0, 256, (4, *image), np.uint8) for _ in range(6)])
    facts = Facts(
        learner=Plugin(name=name), backbone=Plugin(name="conv4"), image=ImageRule(size=options.size, channels=1)
    )
    support = random.integers(0, 256, (WAYS * SHOTS, *image), np.uint8)
    query = random.integers(0, 256, (WAYS * QUERIES, *image), np.uint8)
    classes = np.arange(WAYS)
    labels = classes.repeat(SHOTS)
    with tempfile.TemporaryDirectory() as folder:
        export(learner, Path(folder) / "bundle", facts=facts, data=noise, shape=Shape(3, 1, 2), seed=1, episodes=10)
        bundle = Bundle.open(Path(folder) / "bundle", arena=True)

    def torch_adapt() -> dict[str, torch.Tensor]:
        return learner.adapt(floats(support), torch.from_numpy(labels), torch.from_numpy(classes))

    with torch.no_grad():
        torch_state, state = torch_adapt(), bundle.adapt_arrays(support, labels, classes)
        graphs = bundle.graphs
        classify = graphs.baked(state) if graphs.bakes else partial(graphs.classify, state)
        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            f"adapt to {len(support)}": (torch_adapt, lambda: bundle.adapt_arrays(support, labels, classes)),
            f"classify {len(query)}": (
                lambda: learner.classify(torch_state, floats(query)),
                lambda: classify(query),
            ),
            "classify 1": (lambda: learner.classify(torch_state, floats(query[:1])), lambda: classify(query[:1])),
        }
        plain = {what: timed(*pair, options.rounds) for what, pair in pairs.items()}
        with kept():
            tuned = {what: timed(*pair, options.rounds) for what, pair in pairs.items()}
    return [row(name, what, plain[what], tuned[what]) for what in pairs]


def timed(torchs: Callable[[], object], onnxs: Callable[[], object], rounds: int) -> np.ndarray:
    """Milliseconds (rounds, 2) of torch and of onnxruntime, alternating."""
    torchs(), onnxs()
    return np.array([[milliseconds(torchs), milliseconds(onnxs)] for _ in range(rounds)])


def row(name: str, what: str, plain: np.ndarray, tuned: np.ndarray) -> dict[str, object]:
    low, middle, high = np.percentile(plain[:, 0] / plain[:, 1], [25, 50, 75])
    torch_ms, onnx_ms = np.median(plain, 0)
    to_tuned = np.median(tuned[:, 0] / tuned[:, 1])
    print(f"{name:9} {what:14} torch {torch_ms:8.2f} ms, onnxruntime {onnx_ms:8.2f} ms: {middle:5.2f} times as fast "
          f"({low:.2f} to {high:.2f}); {to_tuned:.2f} where torch's memory is kept", flush=True)  # fmt: skip
    return {
        "learner": name,
        "what": what,
        "torch_ms": round(float(torch_ms), 3),
        "onnxruntime_ms": round(float(onnx_ms), 3),
        "ratio": round(float(middle), 3),
        "ratio_middle_half": [round(float(low), 3), round(float(high), 3)],
        "ratio_to_torch_with_memory_kept": round(float(to_tuned), 3),
    }


def milliseconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return 1000 * (time.process_time() - started)


def floats(images: np.ndarray) -> torch.Tensor:
    """Images as in episodes: floats in 0..1, channels last."""
    source = torch.from_numpy(images)
    return torch.empty(source.shape, memory_format=torch.channels_last).copy_(source).div_(255)


def machine() -> str:
    """The processor's name, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
