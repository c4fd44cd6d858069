"""The task `meta_train`: meta-trains a learner, or selects a head on frozen features."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from kshot import training
from kshot.learner import Learner
from kshot.recipe import Recipe
from kshot_flows import project
from kshot_flows.console import profiling, progress
from kshot_flows.report import artifacts, experiment
from kshot_flows.store import embeddings, keys, learners
from kshot_flows.store.products import DataVersion, Pin, Trained, relative
from kshot_flows.store.results import task
from kshot_flows.tasks import heads
from kshot_flows.tasks.data import test_classes
from kshot_flows.tracking import curves


@task(keys.meta_train, shows=artifacts.publish, tags={"compute"})
def meta_train(recipe: Recipe, data: DataVersion) -> Trained:
    """Write `runs/RECIPE/KEY/learner.pt`, by meta-training or, without it, by selecting a head.

    An interrupted meta-training resumes from its last checkpoint.
    """
    embeddings.device(), test_classes(recipe, data)  # report what cannot work before hours of training
    folder = project.home() / "runs" / recipe.name / keys.meta_train(recipe, data).removeprefix("train-")[:12]
    for unfinished in folder.glob(".*.pt.*"):  # left by a killed process: this process holds the key's lock
        unfinished.unlink()
    torch.manual_seed(recipe.seed)
    return (_trained if recipe.training.steps else _chosen)(recipe, data, folder)


def _trained(recipe: Recipe, data: DataVersion, folder: Path) -> Trained:
    splits, settings = recipe.dataset, recipe.training
    learner = recipe.build(data.open().rule.shape)
    position = _checkpoint(recipe, folder).get("step", 0)
    if position:
        progress.say(f"  goes on from the checkpoint at step {position} of {settings.steps}")
    curve, memory = curves.Curve(folder / "curve.jsonl", settings.steps, position), 0
    with (
        experiment.training_run(recipe, data, folder) as run,
        curves.sending(run, curve) as send,
        training.launched(embeddings.ranks(), _other_rank, recipe, data, folder),
    ):
        steps = _steps(learner, recipe, data, folder)
        for step in progress.training(profiling.steps(steps, folder / profiling.FOLDER)):
            send(curve.add(step))
            memory = step.memory
    heads.learn_statistics(learner, data.classes(splits.train), data.name)
    reached = _checkpoint(recipe, folder)
    chosen = heads.choose_steps(recipe, learner, data)
    learners.save(folder / "learner.pt", learner, chosen, data, reached["history"])
    (folder / training.CHECKPOINTS[1]).unlink(missing_ok=True)
    best: dict[str, float] = next(point for point in reached["history"] if point["step"] == reached["best_step"])
    return Trained(
        Pin.of(folder / "learner.pt"), data, run.id, reached["step"], reached["best_step"],
        settings.validation_shape, best["validation"], best["margin"], reached["seconds"],
        memory=memory,
    )  # fmt: skip


def _steps(learner: Learner, recipe: Recipe, data: DataVersion, folder: Path) -> Iterator[training.Progress]:
    splits = recipe.dataset
    return training.meta_train(
        learner, data.classes(splits.train), data.classes(splits.validation), recipe.training,
        folder=folder, seed=recipe.seed, recipe=keys.training_part(recipe), device=embeddings.device(),
        unlabelled=data.classes(splits.unlabelled) if splits.unlabelled else None, store=embeddings.folder(),
    )  # fmt: skip


def _other_rank(recipe: Recipe, data: DataVersion, folder: Path) -> None:
    """The work of an additional process that shares the training."""
    for _ in _steps(recipe.build(data.open().rule.shape), recipe, data, folder):
        pass


def _chosen(recipe: Recipe, data: DataVersion, folder: Path) -> Trained:
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with experiment.training_run(recipe, data, folder) as run:
        chosen, learner, tried = heads.choose(recipe, data)
        best = next((one for one in tried if one.chosen), None)
        history = [] if best is None else [
            {"step": 0, "validation": best.accuracies[0], "margin": best.margins[0]}
        ]  # fmt: skip
        learners.save(folder / "learner.pt", learner, chosen, data, history)
    seconds = time.monotonic() - began
    learned = Pin.of(folder / "learner.pt"), data, run.id, 0, 0
    if best is None:
        return Trained(*learned, None, None, None, seconds)
    return Trained(*learned, best.shapes[0], best.accuracies[0], best.margins[0], seconds, best.label, tried)


def _checkpoint(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The newest usable checkpoint of a training; empty if there is none."""
    held, aside = training.checkpoint(folder)
    why = "cannot be read"
    if held and (differ := training.foreign(held, recipe.training, keys.training_part(recipe), recipe.seed)):
        held, aside, why = {}, [folder / name for name in training.CHECKPOINTS], f"is of another training: {differ}"
        for file in aside:
            training.set_aside(file)
    for file in aside:
        progress.say(escape(f"  {relative(file)} {why}; it is {file.name}.damaged now"))
    return held
