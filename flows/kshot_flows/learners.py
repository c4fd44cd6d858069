"""A meta-trained learner as one file that says what made it: weights, resolved recipe, dataset version, history."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kshot.learner import Learner
from kshot.recipe import Recipe
from kshot.training import save_atomically
from kshot_flows.products import DataVersion
from kshot_runtime.errors import KshotError


def save(file: Path, learner: Learner, recipe: Recipe, data: DataVersion, history: list[dict[str, float]]) -> None:
    """Write `learner.pt`. The same training gives the same bytes: no dates, no durations, no paths."""
    held = {
        "kshot": version("kshot"),
        "recipe": recipe.model_dump(mode="json"),
        "data": {"name": data.name, "version": data.version},
        "image": list(learner.backbone.image),
        "base_classes": len(data.open().split(recipe.dataset.train, recipe.dataset.rotations)),
        "history": history,
        "weights": {name: value.cpu() for name, value in learner.state_dict().items()},
    }
    save_atomically(held, file)


def load(file: Path) -> Learner:
    """The learner in a file, ready to adapt."""
    held = read(file)
    learner = Recipe.model_validate(held["recipe"]).build(tuple(held["image"]))
    learner.prepare(held["base_classes"])
    learner.load_state_dict(held["weights"])
    return learner.eval()


def read(file: Path) -> dict[str, Any]:
    """All that a learner's file says."""
    try:
        held: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise KshotError(f"there is no learner at {file}. `kshot run RECIPE` makes one.") from None
    return held
