"""The outer loop: meta-train a learner on episodes, select the model on validation episodes, resume after a crash."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from kshot import malloc
from kshot.data.augmentation import Augmentation, augment
from kshot.data.datasets import ClassImages
from kshot.data.embeddings import embedded
from kshot.data.episodes import Episodes, check_shape, sample_episodes, sample_images
from kshot.data.placed import placed
from kshot.evaluation.scores import evaluate
from kshot.learner import Learner
from kshot.training.checkpoint import Run, checkpoint, foreign, resume, save
from kshot.training.distributed import Ranks, join
from kshot.training.graph import Graphs
from kshot.training.settings import Training
from kshot.training.step import learning_rate, make_optimiser, set_rate, update
from kshot_runtime.errors import KshotError


@dataclass(frozen=True)
class Progress:
    """The progress of training after an outer step."""

    step: int
    steps: int
    loss: float
    lr: float
    seconds: float  # of training, those before a resumption included
    memory: int = 0  # peak bytes so far: of tensors on a GPU, of this process on a CPU
    validation: float | None = None  # accuracy, if this step was validated
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
    """Meta-train `learner` in place, yielding after every outer step; afterwards it has the best validated weights.

    Each validation ends with a checkpoint in `folder`, written atomically; the previous one is kept. Called again with
    the same folder after a crash, training resumes from the newest readable checkpoint, on a CPU with bitwise the same
    result: checkpoints hold weights, optimiser, random state and step, and episodes depend on (seed, step) only. A
    checkpoint of another `recipe` is refused.

    `unlabelled` adds some of its images to every batch, without labels. Features of a frozen backbone are computed
    once, in memory or in the embedding store `store`.

    Under torchrun, or `kshot.training.launched`, the ranks share the episodes of each step. The first validates,
    writes checkpoints and yields; the others yield nothing. A run may be resumed with another number of ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shape in settings.shapes:
        check_shape(train, shape)
    check_shape(validation, settings.validation_shape)
    ranks, device = join(device)
    with malloc.kept():
        settings.check_parts(type(learner), type(learner.backbone), learner.backbone.norm, ranks.count)
        _prepare(learner, train, seed, device, ranks)
        if learner.backbone.frozen and settings.augment == Augmentation():
            train, validation = (embedded(learner, part, store=store, device=device) for part in (train, validation))
        else:
            train = placed(train, device)
        pool = None if unlabelled is None else placed(unlabelled, device)
        loop = _Loop(learner, settings, seed, device, ranks)
        loop.start(folder, recipe or {})
        yield from loop.run(partial(_draw, train, pool, settings, seed, device), validation, folder)


def _prepare(learner: Learner, train: ClassImages, seed: int, device: str, ranks: Ranks) -> None:
    """Let the learner create what only training needs, and copy the first rank's weights to all ranks."""
    torch.manual_seed(seed)
    if not any(parameter.requires_grad for parameter in learner.parameters()):  # before `prepare` adds parameters
        raise KshotError(
            f"{learner.name!r} has nothing to train on this backbone: all weights are frozen. "
            "Use it as it is with training.steps = 0, or set frozen = false in [backbone]."
        )
    learner.prepare(train.classes_per_data_set)
    learner.load_state_dict(ranks.share(learner.state_dict))
    learner.to(device)


def _draw(
    train: ClassImages, unlabelled: ClassImages | None, settings: Training, seed: int, device: str, step: int
) -> Episodes:
    """The batch of an outer step, on the device; it depends on (seed, step) only."""
    shape = settings.shapes[step % len(settings.shapes)]
    batch = sample_episodes(train, shape, settings.episodes_per_step, seed=seed, step=step)
    if unlabelled is not None:
        batch = replace(batch, unlabelled=sample_images(unlabelled, settings.unlabelled_images, seed=seed, step=step))
    return augment(batch.to(device), settings.augment, seed=seed, step=step)


class _Loop:
    """A training run, which can be resumed."""

    position: Run

    def __init__(self, learner: Learner, settings: Training, seed: int, device: str, ranks: Ranks) -> None:
        self.learner, self.settings, self.seed, self.ranks = learner, settings, seed, ranks
        self.device = torch.device(device)
        self.optimiser = make_optimiser(learner, settings, self.device)
        self.update: Callable[[Episodes], Tensor] = partial(
            update, learner, optimiser=self.optimiser, settings=settings, ranks=ranks
        )
        if settings.cuda_graph and self.device.type == "cuda":
            if ranks.count > 1:
                raise KshotError("CUDA graphs do not work with several ranks: set training.cuda_graph = false")
            self.update = Graphs(learner, self.update)
        self.memory = 0

    def start(self, folder: Path, recipe: dict[str, Any]) -> None:
        """Start at step 0, or resume from the newest readable checkpoint in the folder."""
        self.position = Run(settings=self.settings.model_dump(), recipe=recipe, seed=self.seed)
        content, damaged = self.ranks.share(lambda: checkpoint(folder))
        for file in damaged if self.ranks.first else ():
            warnings.warn(f"{file} cannot be read, and was renamed to {file.name}.damaged", stacklevel=3)
        if content and (differ := foreign(content, self.settings, recipe, self.seed)):
            raise KshotError(
                f"{folder} has a checkpoint of another run: {differ}. Give this run its own folder, or delete that one."
            )
        if content:
            self.position = resume(content, self.learner, self.optimiser)
        if not self.ranks.first:  # ranks use different random numbers
            torch.manual_seed(hash((self.seed, self.position.step, self.ranks.number)))

    def run(self, draw: Callable[[int], Episodes], validation: ClassImages, folder: Path) -> Iterator[Progress]:
        """Take the remaining steps and yield the progress of each; at the end, load the best weights."""
        run, settings = self.position, self.settings
        first_step, unread = run.step, deque[_Step]()
        while run.step < settings.steps and not run.exhausted(settings.patience):
            started = time.perf_counter()
            unread.append(self.take(draw(run.step)))
            if run.step == first_step + 1:
                self.ranks.check_alike(self.learner)
            due = run.step % settings.validate_every == 0 or run.step == settings.steps
            reports = [
                self.report(unread.popleft()) for _ in range(len(unread) - (0 if due else _steps_ahead(self.device)))
            ]
            if due:
                reports[-1] = self.validate(reports[-1], validation)
            run.seconds += time.perf_counter() - started
            if self.ranks.first:
                if due:
                    save(folder, run, self.learner, self.optimiser)
                yield from (replace(report, seconds=run.seconds) for report in reports)
        self.learner.load_state_dict(run.best_weights)
        self.learner.eval()

    def take(self, batch: Episodes) -> _Step:
        """Take an outer step, without waiting for its loss."""
        lr = learning_rate(self.settings, self.position.step)
        set_rate(self.optimiser, lr)
        self.learner.train()
        loss = self.update(batch)
        self.learner.stepped()
        self.position.step += 1
        return _Step(self.position.step, lr, loss)

    def report(self, taken: _Step) -> Progress:
        """The progress after a step whose loss is read now; a KshotError if it is not finite."""
        run, settings, loss = self.position, self.settings, taken.loss()
        if not math.isfinite(loss):
            raise KshotError(
                f"the loss became {loss} at outer step {taken.step}. "
                f"Lower training.lr (now {settings.lr}) or set training.clip."
            )
        self.memory = max(self.memory, _memory(self.device))
        return Progress(
            taken.step, settings.steps, loss, taken.lr, run.seconds, self.memory, best_step=run.best_step, best=run.best
        )

    def validate(self, last: Progress, validation: ClassImages) -> Progress:
        """Score the learner on validation episodes, and keep a copy of its weights if they are the best so far."""
        run, settings = self.position, self.settings
        self.ranks.check_alike(self.learner)

        def score() -> tuple[float, float]:
            shape, episodes, device = settings.validation_shape, settings.validation_episodes, str(self.device)
            found = evaluate(self.learner, validation, shape, episodes, seed=self.seed, stream="val", device=device)
            return found.accuracy, found.margin

        accuracy, margin = self.ranks.share(score)
        run.history.append({"step": run.step, "loss": last.loss, "validation": accuracy, "margin": margin})
        if run.best is None or accuracy > run.best:
            run.best, run.best_step = accuracy, run.step
            run.best_weights = {name: value.detach().clone() for name, value in self.learner.state_dict().items()}
        return replace(last, validation=accuracy, margin=margin, best_step=run.best_step, best=run.best)


class _Step:
    """A step whose loss is copied to the CPU asynchronously."""

    def __init__(self, step: int, lr: float, loss: Tensor) -> None:
        self.step, self.lr = step, lr
        self._copied = torch.cuda.Event() if loss.is_cuda else None
        self._loss = loss.detach().to("cpu", non_blocking=loss.is_cuda)
        if self._copied:
            self._copied.record()

    def loss(self) -> float:
        if self._copied:
            self._copied.synchronize()
        return float(self._loss)


def _steps_ahead(device: torch.device) -> int:
    """Number of steps after which a loss is read: by then a GPU has finished the step, so the CPU does not wait."""
    return 4 if device.type == "cuda" else 0


def _memory(device: torch.device) -> int:
    """Bytes: on a GPU the peak of allocated tensors, else of this process now, which keeps memory between steps."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
