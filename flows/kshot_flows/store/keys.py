"""Cache keys of steps, made from content only, never from times, paths or names of runs.

A key contains hashes of the inputs, the part of the recipe that the step reads, and of the code: kshot's
version, the source of the modules that the step uses, of the plugins and the kshot modules that they import, and
their distribution's version.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kshot import plugins
from kshot.data.datasets import file_sha256

if TYPE_CHECKING:
    from kshot.plugins import Provided
    from kshot.recipe import Recipe
    from kshot_flows.store.products import DataVersion, Exported, Registered, Scores, Trained

TEST_SEED = (
    0  # of evaluation episodes: the same in every run, so that any two versions can be compared by paired differences
)
CALIBRATION_EPISODES = 200
VERIFICATION_PAIRS = 1000

_LEARNING = "kshot.backbones", "kshot.data", "kshot.gradients", "kshot.learner", "kshot.norms", "kshot.ops"
_EVALUATING = "kshot.evaluation", "kshot.selection"
_EXPORTING = "kshot.export", "kshot_runtime.bundle", "kshot_runtime.images", "kshot_runtime.manifest"
# Modules that are in every key with plugins anyway, or that do not influence results.
_KNOWN = {*_LEARNING, *_EVALUATING, "kshot.hookspecs"}


def version_data(recipe: Recipe) -> str:
    """By the data sets' names: that the content is unchanged is checked when the result is reused."""
    return _key("data", recipe.dataset.model_dump(mode="json"))


def meta_train(recipe: Recipe, data: DataVersion) -> str:
    return _key(
        "train", data.identity_of(*_learned_from(recipe)), training_part(recipe),
        _plugins(recipe), code(*_LEARNING, *_EVALUATING, "kshot.training"),
    )  # fmt: skip


def evaluate(recipe: Recipe, data: DataVersion, learner: Trained) -> str:

    read = recipe.model_dump(
        mode="json",
        include={
            "evaluation": True,
            "dataset": {"rotations", "across_groups", "train", "validation", "test"},
            "training": {"folds", "steps"},
        },
    )
    played = data.identity_of(*_learned_from(recipe), recipe.dataset.test)
    fixed = TEST_SEED, CALIBRATION_EPISODES, VERIFICATION_PAIRS
    return _key("evaluate", learner.identity, played, read, fixed, _plugins(recipe), code(*_LEARNING, *_EVALUATING))


def export(recipe: Recipe, learner: Trained, score: Scores) -> str:
    return _key(
        "export", recipe.name, learner.identity, score.identity,
        _plugins(recipe), code(*_LEARNING, *_EVALUATING, *_EXPORTING),
    )  # fmt: skip


def register(recipe: Recipe, data: DataVersion, score: Scores, bundle: Exported) -> str:
    from kshot_flows.tracking import stores

    everything = recipe.model_dump(mode="json", exclude={"gate"})
    store = stores.label()
    return _key("register", everything, data.identity, score.identity, bundle.identity, store)


def promote(recipe: Recipe, version: Registered) -> str:
    return _key("promote", version.identity, recipe.gate)


def training_part(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that determines the learned weights; checkpoints of other trainings are refused by it."""
    content: dict[str, Any] = recipe.model_dump(mode="json", include={"seed", "backbone", "learner", "training"})
    data = recipe.dataset.model_dump(
        mode="json", include={"rotations", "across_groups", "train", "validation", "unlabelled"}
    )
    return {**content, "dataset": data}


def _learned_from(recipe: Recipe) -> tuple[str | None, ...]:
    return recipe.dataset.train, recipe.dataset.validation, recipe.dataset.unlabelled


@cache
def code(*modules: str) -> str:
    """sha256 over the source of some modules and packages."""
    digest = hashlib.sha256(importlib.metadata.version("kshot").encode())
    for name in modules:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(name)
        folders = found.submodule_search_locations
        files = sorted(Path(folders[0]).glob("*.py")) if folders else [Path(found.origin)]
        for file in files:
            digest.update(f"{name} {file.name}".encode() + file.read_bytes())
    return digest.hexdigest()


def _plugins(recipe: Recipe) -> list[str]:
    found = plugins.find()
    start = recipe.backbone.options.get("start")
    return [
        *(_plugin(found.learner(name)) for name in recipe.learner.names),
        _plugin(found.backbone(recipe.backbone.name)),
        *([file_sha256(Path(start))] if start and Path(start).is_file() else []),
    ]


def _plugin(provided: Provided) -> str:
    digest = hashlib.sha256()
    for module in _own_modules(sys.modules[provided.value.__module__]):
        digest.update(Path(inspect.getfile(module)).read_bytes())
    return f"{provided.name} {provided.distribution} {provided.version} {digest.hexdigest()}"


def _own_modules(module: ModuleType) -> list[ModuleType]:
    """A plugin's module and, recursively, modules of its package and of kshot that it imports from; by name.

    Modules of kshot that are in the keys anyway are left out.
    """
    packages, found, left = (module.__name__.partition(".")[0], "kshot"), {}, [module]
    while left:
        one = left.pop()
        known = ".".join(one.__name__.split(".")[:2]) in {*_KNOWN, "kshot"}
        if one.__name__ in found or known or one.__name__.partition(".")[0] not in packages:
            continue
        found[one.__name__] = one
        names = (
            value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "")
            for value in vars(one).values()
        )
        left += [sys.modules[name] for name in names if isinstance(name, str) and name in sys.modules]
    return [found[name] for name in sorted(found)]


def _key(step: str, *parts: Any) -> str:
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{step}-{digest[:32]}"
