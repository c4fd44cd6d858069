"""Training checkpoints: written atomically; the previous one is kept, and damaged ones are renamed."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from kshot.learner import Learner
from kshot.training.settings import Training

CHECKPOINTS = "last.pt", "previous.pt"
"""File names of the newest checkpoint and of the one before it."""


@dataclass
class Run:
    """The state of a training except that of the learner and the optimiser."""

    settings: dict[str, Any]
    recipe: dict[str, Any]
    seed: int
    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)  # empty before the first validation
    history: list[dict[str, float]] = field(default_factory=list)

    def exhausted(self, patience: int | None) -> bool:
        """Whether the last `patience` validations were not better than the best before them."""
        if patience is None or self.best_step is None:
            return False
        return sum(point["step"] > self.best_step for point in self.history) >= patience


_PARTS = {*(part.name for part in fields(Run)), "learner", "optimiser", "random"}  # of a checkpoint


def checkpoint(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """The newest readable checkpoint in a folder ({} if there is none), and the paths of damaged ones.

    A truncated file, or one that is not a checkpoint, is renamed to `NAME.damaged` so that training can go on.
    """
    damaged: list[Path] = []
    for file in (folder / name for name in CHECKPOINTS):
        try:
            with zipfile.ZipFile(file) as archive:
                intact = archive.testzip() is None  # torch does not verify checksums
            content: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
            if intact and content.keys() >= _PARTS:
                return content, damaged
        except FileNotFoundError:
            continue
        except Exception as error:  # parsing arbitrary bytes may raise anything
            if isinstance(error, (OSError, MemoryError)) or "allocate" in str(error):  # the file may be intact
                raise
        set_aside(file)
        damaged.append(file)
    return {}, damaged


def set_aside(file: Path) -> None:
    """Rename a checkpoint that cannot be resumed from to `NAME.damaged`."""
    with suppress(FileNotFoundError):
        file.replace(file.with_name(f"{file.name}.damaged"))


def foreign(content: dict[str, Any], settings: Training, recipe: dict[str, Any], seed: int) -> str:
    """The differences between a checkpoint's run and this one, in words; "" if there are none."""
    now = {"settings": settings.model_dump(), "recipe": recipe, "seed": seed}
    return "; ".join(f"its {one}" for part in now for one in _differences(part, content[part], now[part]))


def save(folder: Path, run: Run, learner: Learner, optimiser: torch.optim.Optimizer) -> None:
    content = asdict(run) | {
        "learner": learner.state_dict(),
        "optimiser": optimiser.state_dict(),
        "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())],
    }
    newest, previous = (folder / name for name in CHECKPOINTS)
    save_atomically(content, newest, previous)


def save_atomically(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """torch.save that leaves the old file or the new one, even on a power failure; the old one moves to `previous`."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)  # if killed here, `path` is missing, and `checkpoint` reads `previous`
        unfinished.replace(path)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()


def resume(content: dict[str, Any], learner: Learner, optimiser: torch.optim.Optimizer) -> Run:
    learner.load_state_dict(content["learner"])
    for saved, own in zip(content["optimiser"]["param_groups"], optimiser.param_groups, strict=True):
        saved |= {name: own[name] for name in ("fused", "capturable") if name in own}  # as this device needs
    optimiser.load_state_dict(content["optimiser"])
    host, *gpus = content["random"]
    torch.set_rng_state(host)
    for number, state in enumerate(gpus[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, number)
    return Run(**{part.name: content[part.name] for part in fields(Run)})


def _differences(name: str, then: Any, now: Any) -> list[str]:
    """The differences between two nested dicts of settings, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        inner = (_differences(key, then.get(key), now.get(key)) for key in dict.fromkeys([*then, *now]))
        return [f"{name}.{one}" for part in inner for one in part]
    return [] if then == now else [f"{name} was {then!r}, and is now {now!r}"]
