"""What is kept of photos, and how much of it one label space may hold."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import Limits
from kshot_serve.errors import Problem
from kshot_serve.models.champion import Champion
from kshot_serve.settings import Settings
from kshot_serve.spaces.metadata import stripped
from kshot_serve.spaces.questions import Query
from kshot_serve.spaces.states import features_of, pixels_by
from kshot_serve.spaces.uploads import Upload
from kshot_serve.storage.revision import Write
from kshot_serve.storage.values import ORIGINAL, Key

THUMBNAIL = ImageRule(size=160, fit="crop", resize="bilinear")


def contents(champion: Champion, uploads: Sequence[Upload], query: Query, settings: Settings) -> list[dict[Key, bytes]]:
    """What is kept of each photo: its pixels, its features where the bundle adapts to them, and the file it came as."""
    kept = []
    for i, upload in enumerate(uploads):
        made: dict[Key, bytes] = {pixels_by(champion.bundle.manifest.image): query.images[i].tobytes()}
        if settings.keep_photos:
            made[ORIGINAL] = stripped(upload.content) if settings.strip_metadata else upload.content
        if query.features is not None:
            made[features_of(champion)] = query.features[i].tobytes()
        kept.append(made)
    return kept


def picture(kept: dict[Key, bytes], rule: ImageRule) -> bytes:
    """A photo as it came, or its pixels as a PNG from which the rule makes the same pixels."""
    if ORIGINAL in kept:
        return kept[ORIGINAL]
    if (content := kept.get(pixels_by(rule))) is None:
        raise Problem("not_ready", "the photo is being prepared for a new model; try again", retry_after=1)
    pixels = np.frombuffer(content, np.uint8).reshape(rule.shape).transpose(1, 2, 0)  # (H, W, C)
    pixels = 255 - pixels if rule.invert else pixels
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if rule.channels == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def thumbnail(pixels: np.ndarray) -> bytes:
    """Pixels (C, H, W) as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=80)
    return file.getvalue()


def check_counts(limits: Limits, photos: Sequence[int]) -> None:
    """Refuse a label space that the bundle cannot adapt to; `photos` has the number of photos of each class."""
    if len(photos) > limits.ways:
        raise Problem("too_many_classes", f"this model tells at most {limits.ways} classes apart", reason="ways")
    if (shots := max(photos, default=0)) > limits.shots:
        message = f"{shots} photos would be in one class; this model learns from at most {limits.shots}"
        raise Problem("too_many_photos", message, reason="shots")
    if sum(photos) > limits.support:
        message = f"{sum(photos)} photos would be in this label space; the model learns from at most {limits.support}"
        raise Problem("too_many_photos", message, reason="support")


def check_bytes(write: Write, most_mb: int) -> None:
    """Refuse a write after which a label space would keep more bytes than it may."""
    if write.stored_bytes() > most_mb * 1_000_000:
        raise Problem(
            "too_many_photos",
            f"the photos of one label space, of all its revisions, may take {most_mb} MB here: delete some, or send "
            "smaller ones",
            reason="bytes",
        )
