"""Triton's statistics of models: what requests under /v2 have taken, in this process, since a model was first asked."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MODELS = 10_000  # that are remembered; of more, those asked last
_STAGES = {"queue": "queue", "compute_input": "decode", "compute_infer": "infer", "compute_output": "decide"}


@dataclass
class _Sum:
    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.ns += round(seconds * 1e9)


@dataclass
class _Model:
    images: int = 0
    last_ms: int = 0
    sums: dict[str, _Sum] = field(default_factory=lambda: {name: _Sum() for name in ("success", "fail", *_STAGES)})


class Statistics:
    """Figures of each model."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, _Model] = OrderedDict()

    def add(self, model: str, seconds: float, images: int, stages: Mapping[str, float]) -> None:
        """Count a request: its images, 0 if it failed, and the seconds that it took, in all and by stage."""
        known = self._models.setdefault(model, _Model())
        self._models.move_to_end(model)
        if len(self._models) > _MODELS:
            self._models.popitem(last=False)
        known.sums["success" if images else "fail"].add(seconds)
        if images:
            known.images += images
            known.last_ms = round(time.time() * 1000)
            for name, stage in _STAGES.items():
                known.sums[name].add(stages.get(stage, 0.0))

    def names(self) -> list[str]:
        return list(self._models)

    def of(self, model: str, version: str) -> dict[str, Any]:
        """The figures in Triton's shape. How many runs there were is not known of a model: they are shared."""
        known = self._models.get(model, _Model())
        return {
            "name": model,
            "version": version,
            "last_inference": known.last_ms,
            "inference_count": known.images,
            "inference_stats": {name: {"count": each.count, "ns": each.ns} for name, each in known.sums.items()},
        }
