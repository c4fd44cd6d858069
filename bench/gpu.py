"""Benchmarks that need an NVIDIA GPU: kshot on CUDA compared with other libraries, and with itself on the CPU.

    python bench/gpu.py [--data data/omniglot] [--rounds 30] [--recipes NAME ... --project FOLDER]
    python bench/gpu.py --smoke          # the same code on a CPU, in seconds; writes nothing

Training steps and evaluation beside learn2learn and easyfsl (bench/peers/environment.py sets them up), trainings to the
marks of bench/time_to_accuracy.py, the bundle under onnxruntime's CUDA provider with bound buffers, and a real `kshot
serve --device cuda`. Writes bench/results/gpu.json, with the GPU's name. Without Omniglot, benchmarks that need it are
skipped. `--recipes` also runs these at full length by `kshot run` in a project folder that has their data, such as
`--recipes omniglot-protonet omniglot-maml mini-imagenet-protonet mini-imagenet-maml --project .`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import serving_load as load
import torch
from time_to_accuracy import ATTEMPTS

from kshot.data.datasets import ClassImages, ImageSet
from kshot.data.episodes import Shape
from kshot.evaluation.scores import evaluate
from kshot.recipe import Recipe
from kshot.testing import toy_images
from kshot.training import Training, meta_train
from kshot_flows import recipes
from kshot_runtime.bundle import Bundle
from kshot_runtime.errors import KshotError

HERE = Path(__file__).parent
BATCHES = (1, 8, 32, 128)
WARM = 10  # warm-up steps: a CUDA graph is captured after three steps of each shape
PLAIN_MAML = {"head": "zero", "steps": 5, "rate": 0.4, "head_rate": 0.08}  # the peers' benchmarks
CASES: dict[str, tuple[str, Shape, int, dict[str, Any]]] = {
    "ProtoNet, 60-way 1-shot, 5 queries": ("protonet", Shape(60, 1, 5), 1, {}),
    "ProtoNet, 5-way 5-shot, 15 queries": ("protonet", Shape(5, 5, 15), 1, {}),
    "MAML, 4 episodes": ("maml", Shape(5, 1, 15), 4, {"first_order": False}),
    "MAML, 32 episodes": ("maml", Shape(5, 1, 15), 32, {"first_order": False}),
    "MAML of first order, 32 episodes": ("maml", Shape(5, 1, 15), 32, {"first_order": True}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "kshot": {},
    "kshot, CUDA graph": {"cuda_graph": True},
    "kshot, CUDA graph, TF32": {"cuda_graph": True, "precision": "tf32"},
    "kshot, CUDA graph, bfloat16": {"cuda_graph": True, "precision": "bfloat16"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "tensorrt"), default="cuda", help="of the bundle")
    parser.add_argument("--data", type=Path, default=Path("data/omniglot"))
    parser.add_argument("--size", type=int, default=84, help="of the bundle's images")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--recipes", nargs="*", default=["glyphs-protonet"], help="to run at full length")
    parser.add_argument("--project", type=Path, help="the folder to run them in; a new one if unset")
    parser.add_argument("--smoke", action="store_true", help="try this script on a CPU")
    options = parser.parse_args()
    if options.smoke:
        smoke()
        return
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here. The same code on a CPU: python bench/gpu.py --smoke")
    found: dict[str, Any] = {"what": f"kshot on {torch.cuda.get_device_name()}", "gpu": torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory() as folder:
        if options.data.exists():
            train = ImageSet.open(options.data).split("train", rotations=True)
            found["steps"] = [steps(case, train, options) for case in CASES]
            found["evaluation"] = evaluation(options)
            found["to accuracy"] = [to_accuracy(attempt, options.data) for attempt in ATTEMPTS]
        bundle = load.build("protonet", Path(folder) / "bundle", size=options.size, channels=3)
        try:
            found["bundle"] = compare(bundle, options.device, options.size, options.rounds, BATCHES)
            found["served"] = served(bundle, Path(folder) / "serve", options)
        except KshotError as error:
            raise SystemExit(str(error)) from None
        project = options.project or Path(folder) / "project"
        found["recipes"] = {name: trained(name, project) for name in options.recipes}
    print(json.dumps(found, indent=2))
    load.write("gpu", found, "torch", "onnxruntime-gpu")


def smoke() -> None:
    """Run everything that needs no GPU, peers or data set: a few steps each on toy images."""
    images, few = toy_images(), Shape(3, 1, 2)
    took = {
        f"{method} {list(variant.values())}": step_ms(method, images, few, 2, {}, variant, "cpu", rounds=2)
        for method in ("protonet", "maml")
        for variant in ({}, {"cuda_graph": True, "precision": "bfloat16"})
    }
    print(json.dumps(took))
    with tempfile.TemporaryDirectory() as folder:
        bundle = load.build("protonet", Path(folder) / "bundle", width=8)
        print(json.dumps(compare(bundle, "cpu", 28, 2, (1, 8), channels=1)))
    recipe = recipes.load("omniglot-protonet", ("training.steps=4", "training.validate_every=4", "training.ways=5"))
    print(json.dumps(trained_to(recipe, images, images, images, {5: 0.0}, "cpu", episodes=8)))


def steps(case: str, images: ClassImages, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per training step: kshot's within `meta_train`, with sampling; the peers' on one batch."""
    method, shape, episodes, settings = CASES[case]
    asked = {"method": method, "data": str(options.data), "shape": [shape.ways, shape.shots, shape.queries]}
    if method == "maml":
        asked |= {"episodes": episodes, "inner": PLAIN_MAML["steps"], **settings}
    losses = peers("losses", asked)
    times = peers("steps", {**asked, "rounds": options.rounds})["times"]
    took = {name: statistics.median(each) for name, each in times.items() if name != "kshot"}
    best, rounds = min(took.values()), options.rounds
    took |= {
        name: step_ms(method, images, shape, episodes, settings, variant, "cuda", rounds)
        for name, variant in VARIANTS.items()
    }
    return {
        "case": case,
        "ms": {name: round(each, 3) for name, each in took.items()},
        "ratio to the best peer": {name: round(best / took[name], 2) for name in VARIANTS},
        "first losses in float64": losses,  # easyfsl embeds support and queries separately, so its batches differ
    }


def peers(measure: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Run bench/peers/contenders.py on the GPU, in the peers' environment."""
    sys.path.insert(0, str(HERE / "peers"))
    from environment import prepare

    command = [prepare(), HERE / "peers" / "contenders.py", json.dumps({"device": "cuda", "measure": measure, **asked})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the peers' measurement failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def step_ms(
    method: str, images: ClassImages, shape: Shape, episodes: int, settings: dict[str, Any],
    variant: dict[str, Any], device: str, rounds: int,
) -> float:  # fmt: skip
    """Mean milliseconds of an outer step inside `meta_train`."""
    norm, warm = "batch" if method == "maml" else "running", min(WARM, rounds)
    learner = {"name": method, **(PLAIN_MAML if method == "maml" else {}), **settings}
    backbone = {"name": "conv4", "width": 64, "norm": norm}
    recipe = Recipe(name="bench", dataset={"name": "bench"}, backbone=backbone, learner=learner)
    training = Training(
        ways=shape.ways, shots=shape.shots, queries=shape.queries, episodes_per_step=episodes,
        steps=warm + rounds + 10, validate_every=warm + rounds + 10, validation_queries=1, **variant,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        taken = meta_train(
            recipe.build(images.shape), images, images, training, folder=Path(folder), seed=1, device=device
        )
        began = 0.0
        for progress in taken:
            if progress.step == warm:
                began = time.perf_counter()
            if progress.step == warm + rounds:
                break
        return 1000 * (time.perf_counter() - began) / rounds


def evaluation(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per test episode, 5-way 1-shot with 15 queries: 10,000 of kshot, 300 of easyfsl, and MAML's."""
    found = {}
    for method, ours, theirs, more in (("protonet", 10_000, 300, {}), ("maml", 60, 60, {"inner": 10})):
        asked = {"method": method, "data": str(options.data), "rounds": 3, "episodes": ours, "peer_episodes": theirs}
        times = peers("evaluation", {**asked, **more})["times"]
        found[method] = {
            name: round(1000 * statistics.median(each) / (ours if name == "kshot" else theirs), 3)
            for name, each in times.items()
        }
    return found


def to_accuracy(attempt: str, data: Path) -> dict[str, Any]:
    """Seconds of training to the accuracy targets of bench/time_to_accuracy.py, or the accuracy reached."""
    asked = ATTEMPTS[attempt]
    recipe = recipes.load(asked.recipe, (*asked.changes, "training.cuda_graph=true"))
    splits = [ImageSet.open(data).split(split, rotations=True) for split in ("train", "val", "test")]
    return {"attempt": attempt, **trained_to(recipe, *splits, asked.marks, "cuda", episodes=1000)}


def trained_to(
    recipe: Recipe, train: ClassImages, validation: ClassImages, test: ClassImages, marks: dict[int, float],
    device: str, episodes: int,
) -> dict[str, Any]:  # fmt: skip
    """Seconds and memory of a training, and its 1-shot test accuracies in % by ways."""
    learner = recipe.build(train.shape)
    began, memory = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        for progress in meta_train(
            learner, train, validation, recipe.training, folder=Path(folder), seed=recipe.seed, device=device
        ):
            memory = progress.memory
    took = time.perf_counter() - began
    queries = min(15, int(test.counts.min()) - 1)
    scores = {ways: evaluate(learner, test, Shape(ways, 1, queries), episodes, seed=0, device=device) for ways in marks}
    return {
        "seconds": round(took, 1),
        "mb": memory >> 20,
        "accuracy": {ways: f"{100 * score.accuracy:.2f} ± {100 * score.margin:.2f}" for ways, score in scores.items()},
        "reached": all(100 * scores[ways].accuracy >= mark for ways, mark in marks.items()),
    }


def compare(
    path: Path, device: Any, size: int, rounds: int, sizes: tuple[int, ...], channels: int = 3
) -> dict[str, Any]:
    """Compare a bundle on a device and on the CPU: features of the same images, and images per second, alternating."""
    bundles = {name: Bundle.open(path, device=name) for name in dict.fromkeys((device, "cpu"))}
    random = np.random.default_rng(0)
    batches = {batch: random.integers(0, 256, (batch, channels, size, size), np.uint8) for batch in sizes}
    here, there = (bundles[name].graphs.embed(batches[sizes[-1]]) for name in (device, "cpu"))
    difference = float(np.abs(here - there).max() / np.abs(there).max())
    speeds: dict[str, dict[str, float]] = {}
    for batch, images in batches.items():
        seconds: dict[str, list[float]] = {name: [] for name in bundles}
        for _ in range(rounds):
            for name, bundle in bundles.items():
                started = time.perf_counter()
                bundle.graphs.embed(images)
                seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        speeds[str(batch)] = {name: round(batch / each, 1) for name, each in medians.items()}
    return {
        "images a second, by batch": speeds,
        "bars": [load.bar("largest difference of features, relative", difference, 1e-3, difference < 1e-3)],
    }


def served(path: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Throughput of a real server on the device at saturation, with every request answered."""

    def photo(thing: int, shade: int) -> bytes:
        return load.photo(thing, shade, size=options.size, channels=3, kind="JPEG")

    with load.serving(path, folder, "--device", options.device) as server:
        space = load.fill(server.client(), 20, photo)
        asked = [load.request(f"/v1/spaces/{space}/classify", photo(thing, 9), "image/jpeg") for thing in range(20)]
        sent = asyncio.run(load.saturate(server.port, asked, clients=16, seconds=20))
    failed = sum(each.reply.status != 200 for each in sent)
    return {
        "photos a second": round(len(sent) / 20, 1),
        "latency_ms": load.milliseconds([each.took for each in sent]),
        "bars": [load.bar("requests that were not answered", failed, 0, failed == 0)],
    }


def trained(name: str, folder: Path) -> dict[str, Any]:
    """Run a recipe at full length on the GPU."""
    folder.mkdir(exist_ok=True)
    kshot = Path(sys.executable).with_name("kshot")
    started = time.perf_counter()
    done = subprocess.run(
        [kshot, "run", name],
        cwd=folder,
        env=os.environ | {"KSHOT_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    table = [line.strip() for line in done.stdout.splitlines() if "-way" in line and "±" in line]
    return {
        "command": f"KSHOT_DEVICE=cuda kshot run {name}",
        "seconds": round(time.perf_counter() - started, 1),
        "table": table,
    }


if __name__ == "__main__":
    main()
