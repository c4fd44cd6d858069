"""Imports torchvision beside a CPU-only build of torch, for which two operators must be declared first."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from kshot_runtime.errors import KshotError

_library: Any = None  # the declarations live as long as this object does


@cache
def torchvision() -> ModuleType:
    """The torchvision package, importable with any build of torch.

    The published wheel of torchvision is compiled for CUDA. Beside a CPU build of torch its compiled part cannot load,
    and the import fails on two undeclared operators; classification never calls them, so declaring them is enough.
    """
    global _library
    if find_spec("torchvision") is None:
        raise KshotError("torchvision is not installed. It comes with pip install 'kshot[train]'.")
    if not torch.backends.cuda.is_built():
        _library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.models

    return torchvision
