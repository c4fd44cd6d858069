"""The outer loop: meta-train a learner on episodes, choose the model on validation episodes, survive being killed."""

from __future__ import annotations

import math
import os
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from kshot import memory
from kshot.augmentation import Augmentation, augment
from kshot.datasets import ClassImages
from kshot.embeddings import embedded
from kshot.episodes import Shape, check_shape, sample_episodes, sample_images
from kshot.evaluation import Score, evaluate
from kshot.learner import Learner
from kshot_runtime.errors import KshotError

CHECKPOINTS = "last.pt", "previous.pt"
"""The newest checkpoint in a training's folder, and the one before it."""


class Training(BaseModel):
    """How to meta-train. An outer step takes one batch of episodes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ways: int = Field(5, ge=2)
    shots: int | tuple[int, ...] = Field(1, description="one number, or several that outer steps take in turns")
    queries: int = Field(15, ge=1)
    episodes_per_step: int = Field(1, ge=1, description="episodes in one outer step (the meta-batch)")
    episodes_at_once: int | None = Field(None, ge=1, description="of these, how many share one backward pass")
    augment: Augmentation = Augmentation()
    unlabelled_images: int = Field(128, ge=1, description="of dataset.unlabelled, if it is set, in every outer step")
    steps: int = Field(1000, ge=0, description="outer steps; 0 takes the backbone as it is built, say pretrained")
    folds: int = Field(
        4, ge=2, description="parts of the classes by which heads, statistics and their settings are cross-validated"
    )
    refit: bool = Field(True, description="export statistics of all classes, those that were tested on too")
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd, Nesterov's; adam has its own")
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "linear", "halve"] = Field("cosine", description="of the learning rate")
    halve_every: int = Field(2000, ge=1, description="outer steps between halvings, for schedule = 'halve'")
    clip: float | None = Field(None, gt=0, description="largest norm of the outer gradient")
    validate_every: int = Field(250, ge=1, description="outer steps between validations, each with a checkpoint")
    validation_ways: int | None = Field(None, ge=2, description="of validation episodes; as in training if unset")
    validation_shots: int | None = Field(None, ge=1, description="the first of shots if unset")
    validation_queries: int = Field(15, ge=1)
    validation_episodes: int = Field(200, ge=1)
    patience: int | None = Field(None, ge=1, description="stop after so many validations without a better one")

    @field_validator("shots")
    @classmethod
    def _are_shots(cls, shots: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if shots == () or any(one < 1 for one in (shots if isinstance(shots, tuple) else (shots,))):
            raise ValueError("shots are a number from 1, or a list of them such as [1, 5]")
        return shots

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of episodes that outer steps take in turns, most often one."""
        shots = self.shots if isinstance(self.shots, tuple) else (self.shots,)
        return tuple(Shape(self.ways, one, self.queries) for one in shots)

    @property
    def validation_shape(self) -> Shape:
        shots = self.validation_shots or self.shapes[0].shots
        return Shape(self.validation_ways or self.ways, shots, self.validation_queries)


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
    run = _Run(settings=settings.model_dump(), recipe=recipe or {}, seed=seed)
    held, damaged = checkpoint(folder)
    for file in damaged:
        warnings.warn(f"{file} cannot be read, and is {file.name}.damaged now", stacklevel=2)
    if held and (differ := foreign(held, settings, run.recipe, seed)):
        raise KshotError(
            f"{folder} has a checkpoint of another run: {differ}. "
            "Give this run a folder of its own, or delete that one."
        )
    if held:
        run = _resume(held, learner, optimiser)

    with memory.kept():
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
                _save(folder, run, learner, optimiser)
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


@dataclass
class _Run:
    """All of a training's position but the learner's and the optimiser's own state."""

    settings: dict[str, Any]
    recipe: dict[str, Any]
    seed: int
    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)  # none before the first validation
    history: list[dict[str, float]] = field(default_factory=list)

    def exhausted(self, patience: int | None) -> bool:
        if patience is None or self.best_step is None:
            return False
        return sum(point["step"] > self.best_step for point in self.history) >= patience


_PARTS = {*(part.name for part in fields(_Run)), "learner", "optimiser", "random"}  # of a checkpoint


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


def checkpoint(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """The newest checkpoint in a folder that can be read, {} without one; and those that could not be, set aside.

    A file that was cut off or is not a checkpoint is renamed to `NAME.damaged`, so that it stops no later training.
    """
    damaged: list[Path] = []
    for file in (folder / name for name in CHECKPOINTS):
        try:
            with zipfile.ZipFile(file) as archive:
                whole = archive.testzip() is None  # torch compares no checksums
            held: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
            if whole and held.keys() >= _PARTS:
                return held, damaged
        except FileNotFoundError:
            continue
        except Exception as error:  # what a parser makes of any bytes
            if isinstance(error, (OSError, MemoryError)) or "allocate" in str(error):  # no damage of the file
                raise
        set_aside(file)
        damaged.append(file)
    return {}, damaged


def set_aside(file: Path) -> None:
    """Rename a checkpoint that no training can go on from, without losing it."""
    with suppress(FileNotFoundError):
        file.replace(file.with_name(f"{file.name}.damaged"))


def foreign(held: dict[str, Any], settings: Training, recipe: dict[str, Any], seed: int) -> str:
    """How the run of a checkpoint differs from the one that is asked for, in words; nothing if it does not."""
    now = {"settings": settings.model_dump(), "recipe": recipe, "seed": seed}
    return "; ".join(f"its {one}" for part in now for one in _differences(part, held[part], now[part]))


def _save(folder: Path, run: _Run, learner: Learner, optimiser: torch.optim.Optimizer) -> None:
    held = asdict(run) | {
        "learner": learner.state_dict(),
        "optimiser": optimiser.state_dict(),
        "random": torch.get_rng_state(),
    }
    newest, previous = (folder / name for name in CHECKPOINTS)
    save_atomically(held, newest, previous)


def save_atomically(held: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """torch.save that leaves the old file or the whole new one, also when the power goes; the old one as `previous`."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            torch.save(held, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)  # killed here, there is no `path` for once, and `checkpoint` takes `previous`
        unfinished.replace(path)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()


def _resume(held: dict[str, Any], learner: Learner, optimiser: torch.optim.Optimizer) -> _Run:
    learner.load_state_dict(held["learner"])
    optimiser.load_state_dict(held["optimiser"])
    torch.set_rng_state(held["random"])
    return _Run(**{part.name: held[part.name] for part in fields(_Run)})


def _differences(name: str, then: Any, now: Any) -> list[str]:
    """What differs between two trees of settings, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        inner = (_differences(key, then.get(key), now.get(key)) for key in dict.fromkeys([*then, *now]))
        return [f"{name}.{one}" for part in inner for one in part]
    return [] if then == now else [f"{name} was {then!r}, and is now {now!r}"]
