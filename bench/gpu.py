"""What only a machine with an NVIDIA GPU can show: the same answers on CUDA as on the CPU, and how much faster.

    python bench/gpu.py [--device cuda|tensorrt] [--size 84] [--rounds 9]

Trains the default recipe with KSHOT_DEVICE=cuda in a scratch folder, compares a bundle on both devices, and asks a real
`kshot serve --device cuda`. Writes bench/results/gpu.json. Full trainings: KSHOT_DEVICE=cuda make reproduce.
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

from kshot_runtime.bundle import Bundle, Device
from kshot_runtime.errors import KshotError

BATCHES = (1, 8, 32, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "tensorrt"), default="cuda")
    parser.add_argument("--size", type=int, default=84)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = load.build("protonet", Path(folder) / "bundle", size=options.size, channels=3)
        try:
            found = {
                "what": f"onnxruntime on {options.device} beside the CPU, conv4, {options.size}x{options.size}x3",
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees",
                "device": options.device,
                "bundle": compare(bundle, options),
                "served": served(bundle, Path(folder) / "serve", options),
                "training": trained(Path(folder) / "project"),
            }
        except KshotError as error:
            raise SystemExit(str(error)) from None
    print(json.dumps(found, indent=2))
    load.write("gpu", found, "torch", "onnxruntime-gpu")


def compare(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A bundle on both devices: features of the same images, and images a second, in interleaved rounds."""
    devices: tuple[Device, Device] = (options.device, "cpu")
    bundles = {device: Bundle.open(path, device=device) for device in devices}
    random = np.random.default_rng(0)
    batches = {size: random.integers(0, 256, (size, 3, options.size, options.size), np.uint8) for size in BATCHES}
    here, there = (bundle.graphs.embed(batches[32]) for bundle in bundles.values())
    difference = float(np.abs(here - there).max() / np.abs(there).max())
    speeds: dict[str, dict[str, float]] = {}
    for size, images in batches.items():
        seconds: dict[str, list[float]] = {device: [] for device in devices}
        for _ in range(options.rounds):
            for device, bundle in bundles.items():
                started = time.perf_counter()
                bundle.graphs.embed(images)
                seconds[device].append(time.perf_counter() - started)
        medians = {device: statistics.median(each) for device, each in seconds.items()}
        speeds[str(size)] = {device: round(size / each, 1) for device, each in medians.items()}
    return {
        "images a second, by batch": speeds,
        "bars": [load.bar("largest difference of features, relative", difference, 1e-3, difference < 1e-3)],
    }


def served(path: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A real server on the device, at saturation: every request answered."""

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


def trained(folder: Path) -> dict[str, Any]:
    """The default recipe with its training on the GPU."""
    folder.mkdir()
    kshot = Path(sys.executable).with_name("kshot")
    started = time.perf_counter()
    done = subprocess.run(
        [kshot, "run", "glyphs-protonet"],
        cwd=folder,
        env=os.environ | {"KSHOT_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the training failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    table = [line.strip() for line in done.stdout.splitlines() if "-way" in line and "±" in line]
    return {
        "command": "KSHOT_DEVICE=cuda kshot run glyphs-protonet",
        "seconds": round(time.perf_counter() - started, 1),
        "table": table,
    }


if __name__ == "__main__":
    main()
