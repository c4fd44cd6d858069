"""Uploaded photos, decoded by the image rule of the bundle."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kshot_runtime.images import ImageError, ImageLimits, ImageRule, ImageTooLargeError, decode
from kshot_serve.errors import Problem
from kshot_serve.inference.engine import Engine
from kshot_serve.observe.metrics import Metrics


@dataclass(frozen=True, eq=False)
class Upload:
    """A photo that came: its bytes, and what decoding made of them by a rule (none: for whichever champion)."""

    content: bytes  # none, if it came as pixels
    pixels: np.ndarray  # uint8 (C, H, W)
    rule: ImageRule | None = None


_SMALL_BYTES, _SMALL_PIXELS = 8192, 128 * 128  # of a photo that is decoded at once on the event loop
_TOGETHER_BYTES = 16384  # of photos that one thread decodes in one call


class Decoder:
    """Decodes uploaded photos in the engine's threads."""

    def __init__(self, engine: Engine, limits: ImageLimits, metrics: Metrics) -> None:
        self._engine = engine
        self._limits = limits
        self._metrics = metrics

    async def read(self, photos: Sequence[bytes], rule: ImageRule) -> list[Upload | Problem]:
        """Each photo decoded by the rule, or why it was not; the others are decoded all the same."""
        if len(photos) == 1 and len(photos[0]) <= _SMALL_BYTES:  # a thread switch would take as long as decoding
            small = self._limits.model_copy(update={"max_pixels": min(_SMALL_PIXELS, self._limits.max_pixels)})
            upload = self._decode(photos[0], rule, small)
            if not isinstance(upload, Problem) or upload.code != "photo_too_large":
                return [upload]

        def decoded(some: Sequence[bytes]) -> list[Upload | Problem]:
            return [self._decode(photo, rule, self._limits) for photo in some]

        parts = await asyncio.gather(*(self._engine.in_thread(decoded, some) for some in _together(photos)))
        return [upload for part in parts for upload in part]

    async def read_all(self, photos: Sequence[bytes], rule: ImageRule, names: Sequence[str] = ()) -> list[Upload]:
        """Each photo decoded by the rule. The first that cannot be is a Problem, with its name or number."""
        return all_sound(await self.read(photos, rule), names)

    def _decode(self, photo: bytes, rule: ImageRule, limits: ImageLimits) -> Upload | Problem:
        with self._metrics.stage("decode"):
            try:
                return Upload(photo, decode(photo, rule, limits), rule)
            except ImageTooLargeError as error:
                return Problem("photo_too_large", str(error))
            except ImageError as error:  # kshot_runtime.images words it, and never with the decoder's own text
                return Problem("not_an_image", str(error))


def _together(photos: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """The photos in the same order, as one thread takes them: a large one alone, as many small ones as are like one."""
    start = size = 0
    for i, photo in enumerate(photos):
        if size and size + len(photo) > _TOGETHER_BYTES:
            yield photos[start:i]
            start, size = i, 0
        size += len(photo)
    yield photos[start:]


def all_sound(uploads: Sequence[Upload | Problem], names: Sequence[str] = ()) -> list[Upload]:
    """The uploads, if every photo is sound; else the first fault, with the name of its photo, or its number."""
    names = names or ([f"photo {number}" for number in range(1, len(uploads) + 1)] if len(uploads) > 1 else [])
    sound = []
    for i, upload in enumerate(uploads):
        if isinstance(upload, Problem):
            raise Problem(upload.code, f"{names[i]}: {upload.message}") if names else upload
        sound.append(upload)
    return sound
