"""The project's embedding store: features of data sets by frozen backbones, computed once."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from kshot.data.datasets import ClassImages
from kshot.data.embeddings import ClassFeatures, embedded
from kshot.data.importing import Progress
from kshot.learner import Learner
from kshot_flows import project
from kshot_flows.console import progress
from kshot_runtime.errors import KshotError


def device() -> str:
    """The device to compute on: KSHOT_DEVICE, or else a GPU if there is one."""
    chosen = os.environ.get("KSHOT_DEVICE")
    if not chosen:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise KshotError(
            f"KSHOT_DEVICE={chosen} cannot be computed on: {reason}. Set it to cpu, or to cuda where there is a GPU, "
            "or unset it."
        ) from None
    return chosen


def ranks() -> int:
    """The number of processes that share a training: KSHOT_RANKS, set by `kshot run --ranks`, or else one."""
    chosen = os.environ.get("KSHOT_RANKS", "1")
    if not chosen.isdecimal() or int(chosen) < 1:
        raise KshotError(f"KSHOT_RANKS={chosen} is no number of processes. Set it to 1 or more, or unset it.")
    return int(chosen)


def folder() -> Path:
    """The folder of the project's embedding store."""
    return project.home() / ".kshot" / "embeddings"


def features(learner: Learner, images: ClassImages, what: str) -> ClassImages:
    """`images` as stored features of the learner's backbone; the images themselves if the learner needs images."""
    with progress.counting(f"embedding {what}") as watch:
        found = embedded(
            learner, images, store=folder(), device=device(), watch=lambda done, total: watch(Progress(done, total, ""))
        )
        return found.complete() if isinstance(found, ClassFeatures) else found
