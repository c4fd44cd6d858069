"""The outer loop: meta-train a learner on episodes, choose the model on validation episodes, survive being killed."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kshot import malloc
from kshot.data.augmentation import Augmentation, augment
from kshot.data.datasets import ClassImages
from kshot.data.embeddings import embedded
from kshot.data.episodes import check_shape, sample_episodes, sample_images
from kshot.evaluation.scores import Score, evaluate
from kshot.learner import Learner
from kshot.training.checkpoint import Run, checkpoint, foreign, resume, save
from kshot.training.settings import Training
from kshot_runtime.errors import KshotError


@dataclass(frozen=True)
class Progress:
    """Where training stands after an outer step."""

    step: int
    steps: int
    loss: float
    lr: float
    seconds: float  # of training, over all the processes that took part
    validation: float | None = None  # accuracy, where this step was validated
    margin: float | None = None  # half its 95 % interval
    best_step: int | None = None
    best: float | None = None


def meta_train(
    learner: Learner,
    train: ClassImages,
    validation: ClassImages,
    settings: Training,
    *,
    folder: Path,
    seed: int,
    recipe: dict[str, Any] | None = None,
    device: str = "cpu",
    unlabelled: ClassImages | None = None,
    store: Path | None = None,
) -> Iterator[Progress]:
    """Meta-train `learner` in place, yielding after every outer step; afterwards it holds the best validated weights.

    Each validation ends with a checkpoint in `folder`, written whole or not at all; the one before is kept too.
    Called again with the same folder after a crash, training goes on from the newest that can be read, on a CPU to
    the same final bits: the checkpoint holds weights, optimiser, random state and position, and episodes depend on
    (seed, step) alone. A checkpoint of another `recipe` is refused. Batches are seeded by the outer step, so their
    order needs no state.

    With `unlabelled`, some of its images come with every batch, without their labels. Features of a frozen backbone
    are computed once, in memory or in the embedding store `store`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shape in settings.shapes:
        check_shape(train, shape)
    check_shape(validation, settings.validation_shape)
    torch.manual_seed(seed)
    if not any(parameter.requires_grad for parameter in learner.parameters()):  # `prepare` adds what only it needs
        raise KshotError(
            f"{learner.name!r} has nothing to train on this backbone: all weights that an answer uses are frozen. "
            "Take it as it is with training.steps = 0, or let the backbone train."
        )
    learner.prepare(train.classes_per_data_set)
    learner.to(device)
    if learner.backbone.frozen and settings.augment == Augmentation():
        train, validation = (embedded(learner, part, store=store, device=device) for part in (train, validation))
    optimiser = _optimiser(learner, settings)
    run = Run(settings=settings.model_dump(), recipe=recipe or {}, seed=seed)
    held, damaged = checkpoint(folder)
    for file in damaged:
        warnings.warn(f"{file} cannot be read, and is {file.name}.damaged now", stacklevel=2)
    if held and (differ := foreign(held, settings, run.recipe, seed)):
        raise KshotError(
            f"{folder} has a checkpoint of another run: {differ}. "
            "Give this run a folder of its own, or delete that one."
        )
    if held:
        run = resume(held, learner, optimiser)

    with malloc.kept():
        while run.step < settings.steps and not run.exhausted(settings.patience):
            started = time.perf_counter()
            learner.train()
            lr = learning_rate(settings, run.step)
            for group in optimiser.param_groups:
                group["lr"] = lr
            shape = settings.shapes[run.step % len(settings.shapes)]
            batch = sample_episodes(train, shape, settings.episodes_per_step, seed=seed, step=run.step)
            if unlabelled is not None:
                pool = sample_images(unlabelled, settings.unlabelled_images, seed=seed, step=run.step)
                batch = replace(batch, unlabelled=pool)
            batch = augment(batch, settings.augment, seed=seed, step=run.step)
            loss = learner_step(learner, batch.to(device), optimiser, settings)
            run.step += 1
            if not math.isfinite(loss):
                raise KshotError(
                    f"the loss became {loss} at outer step {run.step}. "
                    f"Lower training.lr (now {settings.lr}) or set training.clip."
                )
            validation_due = run.step % settings.validate_every == 0 or run.step == settings.steps
            accuracy = margin = None
            if validation_due:
                score = _validate(learner, validation, settings, seed, device)
                accuracy, margin = score.accuracy, score.margin
                run.history.append({"step": run.step, "loss": loss, "validation": accuracy, "margin": margin})
                if run.best is None or accuracy > run.best:
                    run.best, run.best_step = accuracy, run.step
                    run.best_weights = {name: value.detach().clone() for name, value in learner.state_dict().items()}
            run.seconds += time.perf_counter() - started
            if validation_due:
                save(folder, run, learner, optimiser)
            yield Progress(run.step, settings.steps, loss, lr, run.seconds, accuracy, margin, run.best_step, run.best)
    learner.load_state_dict(run.best_weights)
    learner.eval()


def _validate(learner: Learner, validation: ClassImages, settings: Training, seed: int, device: str) -> Score:
    shape, episodes = settings.validation_shape, settings.validation_episodes
    return evaluate(learner, validation, shape, episodes, seed=seed, stream="val", device=device)


def learner_step(learner: Learner, batch: Any, optimiser: torch.optim.Optimizer, settings: Training) -> float:
    """One outer step: the mean meta-loss over a batch, differentiated a few episodes at a time to bound memory."""
    at_once = settings.episodes_at_once or len(batch)
    optimiser.zero_grad(set_to_none=True)
    total = 0.0
    for start in range(0, len(batch), at_once):
        part = batch.part(start, start + at_once)
        loss = learner.meta_loss(part) * (len(part) / len(batch))
        loss.backward()
        total += float(loss.detach())
    if settings.clip is not None:
        torch.nn.utils.clip_grad_norm_(learner.parameters(), settings.clip)
    optimiser.step()
    learner.stepped()
    return total


def learning_rate(settings: Training, step: int) -> float:
    """The outer learning rate at a step: constant, down to zero on a cosine or a line, or halved every so often."""
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    if settings.schedule == "linear":
        return settings.lr * (1 - step / settings.steps)
    if settings.schedule == "halve":
        return settings.lr * 0.5 ** (step // settings.halve_every)
    return settings.lr


def _optimiser(learner: Learner, settings: Training) -> torch.optim.Optimizer:
    parameters = [p for p in learner.parameters() if p.requires_grad]
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        parameters,
        settings.lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )
