"""Checkpoints of a training: written atomically, the previous one kept, damaged ones set aside."""

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
"""The newest checkpoint in a training's folder, and the one before it."""


@dataclass
class Run:
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


_PARTS = {*(part.name for part in fields(Run)), "learner", "optimiser", "random"}  # of a checkpoint


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


def save(folder: Path, run: Run, learner: Learner, optimiser: torch.optim.Optimizer) -> None:
    held = asdict(run) | {
        "learner": learner.state_dict(),
        "optimiser": optimiser.state_dict(),
        "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())],
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


def resume(held: dict[str, Any], learner: Learner, optimiser: torch.optim.Optimizer) -> Run:
    learner.load_state_dict(held["learner"])
    for saved, own in zip(held["optimiser"]["param_groups"], optimiser.param_groups, strict=True):
        saved |= {name: own[name] for name in ("fused", "capturable") if name in own}  # as this device needs
    optimiser.load_state_dict(held["optimiser"])
    host, *gpus = held["random"]
    torch.set_rng_state(host)
    for number, state in enumerate(gpus[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, number)
    return Run(**{part.name: held[part.name] for part in fields(Run)})


def _differences(name: str, then: Any, now: Any) -> list[str]:
    """What differs between two trees of settings, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        inner = (_differences(key, then.get(key), now.get(key)) for key in dict.fromkeys([*then, *now]))
        return [f"{name}.{one}" for part in inner for one in part]
    return [] if then == now else [f"{name} was {then!r}, and is now {now!r}"]
