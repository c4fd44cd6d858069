"""A meta-trained learner as one file that says what made it: weights, resolved recipe, dataset version, history."""

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
    """Write `learner.pt`. The same training gives the same bytes: no dates, no durations, no paths."""
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
    # As text, because a pickle's bytes tell equal objects from identical ones, and so a resumed run from another.
    save_atomically({"about": json.dumps(about), "weights": weights}, file)


def load(file: Path) -> Learner:
    """The learner in a file, ready to adapt."""
    about, weights = read(file)
    about["recipe"]["backbone"].pop("start", None)  # the weights are here
    learner = Recipe.model_validate(about["recipe"]).build(tuple(about["image"]))
    if about["base_classes"]:  # none where it was taken as built
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
    """The recipe of a learner's file: with the one learner and the settings that were chosen."""
    return Recipe.model_validate(read(file)[0]["recipe"])


def read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a learner's file says of it, and its weights."""
    try:
        held = torch.load(file, weights_only=True, map_location="cpu")
        return json.loads(held["about"]), held["weights"]
    except FileNotFoundError:
        raise KshotError(f"there is no learner at {file}. `kshot run RECIPE` makes one.") from None
    except (EOFError, OSError, RuntimeError, UnpicklingError, KeyError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which torch makes of a file that was cut off
            raise
        raise KshotError(f"{file} is damaged or no learner. `kshot run RECIPE` makes it again.") from error
