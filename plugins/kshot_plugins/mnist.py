"""MNIST: the 10,000 handwritten digits of its test file, to try on them what was trained elsewhere.

LeCun, Cortes and Burges, 1998. Ten classes are too few to train on, so there is no train and no val split.
"""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from kshot import KshotError, hookimpl
from kshot.sources import Importer, Listing, Picture, Request
from kshot_runtime.images import ImageRule


@hookimpl
def kshot_datasets() -> dict[str, Importer]:
    return {
        "mnist": Importer(
            about="handwritten digits, to test on only; --from a folder with its t10k files (idx, or idx in .gz)",
            licence="CC BY-SA 3.0, Yann LeCun and Corinna Cortes",
            provenance="MNIST, the test file (t10k)",
            rule=ImageRule(size=28, channels=1),
            open=_open,
            splits={"test": "all ten digits"},
        )
    }


@contextmanager
def _open(request: Request) -> Iterator[Listing]:
    if request.folder is None:
        raise KshotError(
            "give the folder that holds t10k-images-idx3-ubyte(.gz) and t10k-labels-idx1-ubyte(.gz): --from DIR"
        )
    images = read_idx(request.folder, "t10k-images-idx3-ubyte")  # (N, 28, 28)
    labels = read_idx(request.folder, "t10k-labels-idx1-ubyte")  # (N,)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise KshotError(f"{request.folder}: images {images.shape} and labels {labels.shape} do not belong together")
    yield Listing(
        [
            Picture(f"t10k/{i:05d}", str(label), "test", partial(Image.fromarray, image))
            for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
        ]
    )


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An idx file of bytes, in gzip or not: two zeros, 0x08, the number of axes, each axis as big-endian uint32."""
    for path, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if not path.exists():
            continue
        try:
            with opener(path, "rb") as file:
                kind, axes = struct.unpack(">3sB", file.read(4))
                shape = struct.unpack(f">{axes}I", file.read(4 * axes))
                if kind == b"\0\0\x08" and math.prod(shape) < 1 << 30:
                    return np.frombuffer(file.read(math.prod(shape)), np.uint8).reshape(shape)
        except (OSError, EOFError, ValueError, struct.error):
            pass
        raise KshotError(f"{path} is damaged, or no idx file of bytes")
    raise KshotError(f"{folder} has neither {name} nor {name}.gz")
