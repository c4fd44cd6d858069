"""Learner files (`learner.pt`): weights, resolved recipe, dataset version and training history."""

from __future__ import annotations

import errno
import json
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from kshot.learner import Learner
from kshot.recipe import Recipe
from kshot.training import save_atomically
from kshot_flows.store.products import DataVersion
from kshot_runtime.errors import KshotError


def save(file: Path, learner: Learner, recipe: Recipe, data: DataVersion, history: list[dict[str, float]]) -> None:
    """Write `learner.pt`. The same training gives the same bytes: it contains no dates, durations or paths."""
    splits, trained = recipe.dataset, recipe.training.steps > 0
    about = {
        "kshot": version("kshot"),
        "recipe": recipe.model_dump(mode="json"),
        "data": {p.name: p.version for p, _ in data.parts(splits.train, splits.validation, splits.unlabelled)},
        "image": learner.backbone.image,
        "base_classes": data.classes(splits.train).classes_per_data_set if trained else None,
        "history": history,
    }
    weights = {name: value.detach().cpu().clone() for name, value in learner.state_dict().items()}
    # As text: a pickle distinguishes equal from identical objects, and so a resumed run from an uninterrupted one.
    save_atomically({"about": json.dumps(about), "weights": weights}, file)


def load(file: Path) -> Learner:
    """Load the learner of a file, ready to adapt."""
    about, weights = read(file)
    about["recipe"]["backbone"].pop("start", None)  # the weights come from this file
    learner = Recipe.model_validate(about["recipe"]).build(tuple(about["image"]))
    if about["base_classes"]:  # no training history if it was not trained
        learner.prepare(about["base_classes"])
    try:
        learner.load_state_dict(weights)
    except RuntimeError as error:
        raise KshotError(
            f"{file} was written by another version of kshot ({about['kshot']}), with other weights: "
            f"{' '.join(str(error).split())[:300]}. `kshot run RECIPE` makes it again."
        ) from None
    return learner.eval()


def recipe(file: Path) -> Recipe:
    """The recipe in a learner's file, with the selected learner and settings."""
    return Recipe.model_validate(read(file)[0]["recipe"])


def read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata and weights in a learner's file."""
    try:
        held = torch.load(file, weights_only=True, map_location="cpu")
        return json.loads(held["about"]), held["weights"]
    except FileNotFoundError:
        raise KshotError(f"there is no learner at {file}. `kshot run RECIPE` makes one.") from None
    except (EOFError, OSError, RuntimeError, UnpicklingError, KeyError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which torch raises for a truncated file
            raise
        raise KshotError(f"{file} is damaged or no learner. `kshot run RECIPE` makes it again.") from error
