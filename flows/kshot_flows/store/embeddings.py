"""The project's embedding store: what backbones make of a data set's images, computed once."""

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
    """Where to compute: KSHOT_DEVICE, or else a GPU if there is one."""
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
    """How many processes share a training: KSHOT_RANKS, which `kshot run --ranks` sets, or else one."""
    chosen = os.environ.get("KSHOT_RANKS", "1")
    if not chosen.isdecimal() or int(chosen) < 1:
        raise KshotError(f"KSHOT_RANKS={chosen} is no number of processes. Set it to 1 or more, or unset it.")
    return int(chosen)


def folder() -> Path:
    """The project's embedding store."""
    return project.home() / ".kshot" / "embeddings"


def features(learner: Learner, images: ClassImages, what: str) -> ClassImages:
    """`images` as features of the learner's backbone, all computed and stored; as they are if it takes images."""
    with progress.counting(f"embedding {what}") as watch:
        found = embedded(
            learner, images, store=folder(), device=device(), watch=lambda done, total: watch(Progress(done, total, ""))
        )
        return found.complete() if isinstance(found, ClassFeatures) else found
