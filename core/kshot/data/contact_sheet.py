"""Contact sheets: one picture with example images of a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from kshot.data.datasets import ImageSet

_ROWS, _COLUMNS, _SIDE, _LABEL, _GAP = 8, 10, 64, 220, 4


def contact_sheet(data_set: ImageSet) -> Image.Image:
    """A picture with a few, evenly spaced classes of each split, a row for each class."""
    rows = []
    for split in data_set.splits:
        classes = [c for c in data_set.classes if c.split == split]
        chosen = np.linspace(0, len(classes) - 1, min(_ROWS, len(classes))).round().astype(int)
        rows += [classes[i] for i in chosen]
    step = _SIDE + _GAP
    sheet = Image.new("RGB", (_LABEL + _COLUMNS * step, len(rows) * step + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for y, entry in enumerate(rows):
        label = entry.name if len(entry.name) <= 30 else f"{entry.name[:14]}…{entry.name[-15:]}"
        draw.text((_GAP, y * step + 16), f"{label}\n{entry.split}, {entry.count} images", "black", font)
        for x, pixels in enumerate(data_set.images[entry.start : entry.start + min(_COLUMNS, entry.count)]):
            array = pixels.transpose(1, 2, 0)  # (H, W, C)
            image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
            sheet.paste(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), (_LABEL + x * step, y * step + _GAP))
    return sheet
