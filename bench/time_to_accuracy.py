"""CPU seconds of meta-training on Omniglot (Vinyals split) to a target test accuracy.

    python bench/time_to_accuracy.py protonet|maml [--data data/omniglot] [--record "what moved it"]

One thread. The schedule of each attempt is fixed below, and was chosen on validation classes. Time
includes everything that `meta_train` does, with validation; the best weights by validation are tested once, on 1,000
episodes of each shape with 15 queries per class. A run that misses a target is no record. With --record, a run that
reaches its targets adds a row to bench/LEADERBOARD.md; run it on a clean checkout of the commit to be named.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from onnx_vs_torch import machine

from kshot.data.datasets import ImageSet
from kshot.data.episodes import Shape
from kshot.evaluation.scores import evaluate
from kshot.training import meta_train
from kshot_flows import recipes

HERE = Path(__file__).parent
LEADERBOARD = HERE / "LEADERBOARD.md"


@dataclass(frozen=True)
class Attempt:
    """A recipe with overrides, and its target 1-shot test accuracies in %, by ways."""

    recipe: str
    changes: tuple[str, ...]
    marks: dict[int, float]

    @property
    def command(self) -> str:
        return " ".join(("kshot run", self.recipe, *self.changes))


ATTEMPTS = {
    "protonet": Attempt("omniglot-protonet", (), {5: 98.4, 20: 94.9}),
    "maml": Attempt("omniglot-maml", ("training.steps=2500", "training.validate_every=500"), {5: 97.0}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("attempt", choices=ATTEMPTS)
    parser.add_argument("--data", type=Path, default=Path("data/omniglot"))
    parser.add_argument("--record", metavar="TEXT", help="add a row to bench/LEADERBOARD.md: what moved the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    attempt = ATTEMPTS[options.attempt]
    recipe = recipes.load(attempt.recipe, attempt.changes)
    data = ImageSet.open(options.data)
    train, validation, test = (data.split(split, rotations=True) for split in ("train", "val", "test"))
    learner = recipe.build(train.shape)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for progress in meta_train(learner, train, validation, recipe.training, folder=Path(folder), seed=recipe.seed):
            if progress.validation is not None:
                took = time.process_time() - started
                print(f"step {progress.step}: {took:.0f} s, validation {100 * progress.validation:.2f} %", flush=True)
    took = time.process_time() - started
    scores = {ways: evaluate(learner, test, Shape(ways, 1, 15), 1000, seed=recipe.seed) for ways in attempt.marks}
    reached = all(100 * scores[ways].accuracy >= mark for ways, mark in attempt.marks.items())
    row = (
        options.attempt,
        " / ".join(f"{mark:g}" for mark in attempt.marks.values()),
        f"**{took:.0f}**" if reached else f"missed after {took:.0f}",
        " / ".join(f"{100 * score.accuracy:.2f} ± {100 * score.margin:.2f}" for score in scores.values()),
        subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=HERE, text=True).strip(),
        datetime.now(UTC).date().isoformat(),
        machine(),
        options.record or "",
        f"`{attempt.command}`",
    )  # fmt: skip
    line = f"| {' | '.join(row)} |"
    print(line)
    if options.record and not reached:
        raise SystemExit("no record: a mark was missed")
    if options.record:
        LEADERBOARD.write_text(LEADERBOARD.read_text().rstrip("\n") + f"\n{line}\n")


if __name__ == "__main__":
    main()
