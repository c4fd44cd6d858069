"""Uploaded photos, decoded by the image rule of the bundle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kshot_runtime.images import ImageError, ImageLimits, ImageRule, ImageTooLargeError, Undecoded, undecoded
from kshot_serve.errors import Problem
from kshot_serve.inference.engine import Engine
from kshot_serve.inference.turns import Turns
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import Settings


@dataclass(frozen=True, eq=False)
class Upload:
    """A photo that came: its bytes, and what decoding made of them by a rule (none: for whichever champion)."""

    content: bytes  # none, if it came as pixels
    pixels: np.ndarray  # uint8 (C, H, W)
    rule: ImageRule | None = None


_SMALL_BYTES, _SMALL_PIXELS = 8192, 128 * 128  # of a photo that is decoded at once on the event loop
_TOGETHER_BYTES = 16384  # of photos that one thread decodes in one call
_LARGE = 1_000_000  # pixels of a photo from which on it is decoded with the others of its kind


class Decoder:
    """Decodes photos in the engine's threads, callers in turn.

    A large photo waits until its pixels find room among those that are being decoded, which bounds memory; the room is
    shared out so that no more large photos are decoded at once than there are threads.
    """

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self._engine = engine
        self._limits = settings.image
        self._most = settings.request_mp * 1_000_000
        self._metrics = metrics
        self._threads = Turns(engine.decoders)
        self._pixels = Turns(settings.engine.decode_mp * 1_000_000)

    async def read(self, photos: Sequence[bytes], rule: ImageRule, *, kept: bool = False) -> list[Upload | Problem]:
        """Each photo decoded by the rule, or why it was not; the others are decoded all the same.

        Of photos that are kept already, of which there may be many, only the largest number of pixels of any counts.
        """
        limits = self._limits
        if kept:
            limits = limits.model_copy(update={"max_pixels_whole": limits.max_pixels})
        if len(photos) == 1 and len(photos[0]) <= _SMALL_BYTES:  # a thread switch would take as long as decoding
            small = limits.model_copy(update={"max_pixels": min(_SMALL_PIXELS, limits.max_pixels)})
            with self._engine.admission.working():
                found = self._decoded(photos[0], lambda: undecoded(photos[0], rule, small).decode(), rule)
            if isinstance(found, Upload) or found.code != "photo_too_large":
                return [found]
        parts = await asyncio.gather(*(self._begin(some, rule, limits) for some in _together(photos)))
        begun = [each for part in parts for each in part]
        pixels = sum(each.pixels for each in begun if isinstance(each, Undecoded))
        if pixels > self._most and not kept:
            message = f"{pixels:,} pixels are in the photos of this request; at most {self._most:,} are taken"
            raise Problem("photo_too_large", f"{message}: send fewer at once, or smaller ones", reason="pixels")
        return list(await asyncio.gather(*(self._end(*each, rule) for each in zip(photos, begun, strict=True))))

    async def read_all(
        self, photos: Sequence[bytes], rule: ImageRule, names: Sequence[str] = (), *, kept: bool = False
    ) -> list[Upload]:
        """Each photo decoded by the rule. The first that cannot be is a Problem, with its name or number."""
        return all_sound(await self.read(photos, rule, kept=kept), names)

    async def _begin(
        self, photos: Sequence[bytes], rule: ImageRule, limits: ImageLimits
    ) -> list[Upload | Problem | Undecoded]:
        """Small photos are decoded, and of large ones the headers are read."""

        def begun(photo: bytes) -> Upload | Problem | Undecoded:
            found = self._decoded(photo, lambda: undecoded(photo, rule, limits), rule)
            if isinstance(found, Undecoded) and found.pixels <= _LARGE:
                return self._decoded(photo, found.decode, rule)
            return found

        async with self._threads.turn():
            with self._engine.admission.working():
                return await self._engine.in_thread(lambda: [begun(photo) for photo in photos])

    async def _end(self, photo: bytes, begun: Upload | Problem | Undecoded, rule: ImageRule) -> Upload | Problem:
        if not isinstance(begun, Undecoded):
            return begun
        async with self._pixels.turn(max(begun.pixels, self._pixels.room // self._engine.decoders)):
            with self._engine.admission.working():
                return await self._engine.in_decoder(lambda: self._decoded(photo, begun.decode, rule))

    def _decoded(self, photo: bytes, decode: Callable[[], Any], rule: ImageRule) -> Any:
        """What a step of decoding gives, pixels as an Upload; or the Problem that its error is."""
        with self._metrics.stage("decode"):
            try:
                found = decode()
            except ImageTooLargeError as error:
                return Problem("photo_too_large", str(error))
            except ImageError as error:  # kshot_runtime.images words it, and never with the decoder's own text
                return Problem("not_an_image", str(error))
        return Upload(photo, found, rule) if isinstance(found, np.ndarray) else found


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
