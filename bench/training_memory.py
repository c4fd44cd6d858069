"""Time and memory of meta-training with and without keeping freed memory between steps (`kshot.malloc`).

    python bench/training_memory.py [--rounds 5] [--steps 4]

Outer steps of ProtoNet on conv4-64, one thread, on images of 84 x 84 x 3 and of 28 x 28 x 1. Each turn is a process of
its own, turns alternate, and ratios are of one round, of which the median counts. Writes
bench/results/training_memory.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from serving_load import arguments, write

from kshot import malloc
from kshot.data.datasets import ClassImages
from kshot.data.episodes import Shape, sample_episodes
from kshot.recipe import LearnerSettings, PluginSettings, Recipe

CASES = {
    "84x84x3, 10-way 5-shot, 3 queries": (84, 3, Shape(10, 5, 3)),
    "28x28x1, 60-way 1-shot, 1 query": (28, 1, Shape(60, 1, 1)),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="measured in each turn, after two to get warm")
    parser.add_argument("--turn", nargs=2, metavar=("CASE", "HOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn:
        print(json.dumps(turn(*options.turn, options.steps)))
        return
    rows = []
    for case in CASES:
        rounds = [{how: one(case, how, options.steps) for how in ("kept", "free")} for _ in range(options.rounds)]
        row = {"case": case, "ratio": median([each["kept"]["seconds"] / each["free"]["seconds"] for each in rounds])}
        for how in ("kept", "free"):
            row[f"{how}_seconds"] = median([each[how]["seconds"] for each in rounds])
            row[f"{how}_gb"] = median([each[how]["gb"] for each in rounds])
        print(row, flush=True)
        rows.append(row)
    write("training_memory", {"what": "seconds of an outer step, ProtoNet on conv4-64, CPU", "rows": rows}, "torch")


def one(case: str, how: str, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--steps", str(steps), "--turn", case, how]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def turn(case: str, how: str, steps: int) -> dict[str, float]:
    """Seconds per step, and peak memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size, channels, shape = CASES[case]
    random = np.random.default_rng(0)
    noise = ClassImages.from_arrays([random.integers(0, 256, (10, channels, size, size), np.uint8) for _ in range(64)])
    backbone, learner = PluginSettings(name="conv4", width=64), LearnerSettings(name="protonet")
    model = Recipe(name="bench", dataset={"name": "noise"}, backbone=backbone, learner=learner).build(noise.shape)
    optimiser = torch.optim.Adam(model.parameters())
    with malloc.kept() if how == "kept" else nullcontext():
        for step in range(steps + 2):
            if step == 2:
                began = time.perf_counter()
            loss = model.meta_loss(sample_episodes(noise, shape, 1, seed=1, step=step))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        took = time.perf_counter() - began
    return {"seconds": took / steps, "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def median(values: list[float]) -> Any:
    return round(float(np.median(values)), 3)


if __name__ == "__main__":
    main()
