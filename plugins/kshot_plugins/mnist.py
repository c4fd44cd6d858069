"""MNIST: 70,000 handwritten digits, as a test set for learners trained on another domain.

LeCun, Cortes and Burges, 1998. Its split is by images, not by classes: all ten digits are in `test` (the test file)
and in `train` (the training file). Use `train` only as unlabelled images (`dataset.unlabelled`), or with another test
set.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from kshot import ImageRule, Importer, KshotError, Listing, Picture, Request, Split, hookimpl


@hookimpl
def kshot_datasets() -> dict[str, Importer]:
    return {
        "mnist": Importer(
            about="handwritten digits; --from a folder with its four files (idx, or idx in .gz)",
            licence="CC BY-SA 3.0, Yann LeCun and Corinna Cortes",
            provenance="MNIST, the training and test files of Yann LeCun",
            rule=ImageRule(size=28, channels=1),
            open=_open,
            splits={
                "both": "the ten digits twice: test has the 10,000 images of the test file, train the 60,000 others",
                "test": "the ten digits of the test file alone",
            },
        )
    }


@contextmanager
def _open(request: Request) -> Iterator[Listing]:
    if request.folder is None:
        raise KshotError(
            "give the folder that holds t10k-images-idx3-ubyte(.gz) and t10k-labels-idx1-ubyte(.gz), and the same of "
            "train-: --from DIR"
        )
    pictures = _digits(request.folder, "t10k", "test")
    if request.split != "test":
        pictures += _digits(request.folder, "train", "train")
    yield Listing(pictures)


def _digits(folder: Path, file: str, split: Split) -> list[Picture]:
    """The images of one split, each with its digit as the class."""
    try:
        images = read_idx(folder, f"{file}-images-idx3-ubyte")  # (N, 28, 28)
        labels = read_idx(folder, f"{file}-labels-idx1-ubyte")  # (N,)
    except FileNotFoundError as error:
        hint = "" if split == "test" else ". For the test file alone: --split test"
        raise KshotError(f"{error}{hint}") from None
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise KshotError(f"{folder}: images {images.shape} and labels {labels.shape} do not belong together")
    return [
        Picture(f"{file}/{i:05d}", f"{split}/{label}", split, partial(Image.fromarray, image))
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
    ]


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Read an idx file of bytes, plain or gzip: two zeros, 0x08, the number of axes, sizes as big-endian uint32."""
    for path, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if not path.exists():
            continue
        try:
            with opener(path, "rb") as file:
                kind, axes = struct.unpack(">3sB", file.read(4))
                shape = struct.unpack(f">{axes}I", file.read(4 * axes))
                if kind == b"\0\0\x08" and math.prod(shape) < 1 << 30:
                    return np.frombuffer(file.read(math.prod(shape)), np.uint8).reshape(shape)
        except (OSError, EOFError, ValueError, struct.error, zlib.error):
            pass
        raise KshotError(f"{path} is damaged, or no idx file of bytes")
    raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz")
