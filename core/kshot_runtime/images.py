"""The one way a photo becomes the array that a model sees: import, training, batch scripts and HTTP all decode here.

Hostile bytes are expected: formats are named, sizes are checked before pixels are decoded, and errors carry none of the
decoder's own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

from kshot_runtime.errors import KshotError

FORMATS = ("JPEG", "PNG", "WEBP")

_STRIP = 1 << 18  # pixels of a large image that are flattened at once


class ImageError(KshotError):
    """A file that is no image that we take."""


class ImageTooLargeError(ImageError):
    """Too many bytes or too many pixels."""


class ImageRule(BaseModel):
    """How any photo becomes the array that a model sees; stored with a data set and with every bundle made from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1, le=4096)  # side of the square, in pixels
    channels: Literal[1, 3] = 3
    resize: Literal["lanczos", "bicubic", "bilinear", "box", "nearest"] = "lanczos"
    fit: Literal["squash", "crop", "pad"] = "squash"  # what happens to a photo that is not square
    invert: bool = False  # for dark ink on white paper: ink becomes bright, paper 0

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size


class ImageLimits(BaseModel):
    """What a photo may be at most, and at least, before its pixels are decoded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: int = 20_000_000
    max_pixels: int = 25_000_000
    max_pixels_whole: int = 25_000_000  # of a PNG or WebP: unlike a large JPEG they are decoded at their whole size
    max_side: int = 12_000
    max_aspect: float = 25.0
    min_side: int = 8


LIMITS = ImageLimits()


class Undecoded:
    """A photo whose header has been read and is within the limits; none of its pixels are decoded yet.

    `pixels` is what decoding will take of memory, in pixels of about eight bytes.
    """

    def __init__(self, image: Image.Image, rule: ImageRule) -> None:
        self._image = image
        self._rule = rule
        whole = image.width * image.height
        image.draft(None, (2 * rule.size, 2 * rule.size))  # a big JPEG is decoded at a fraction of its size
        self.pixels = image.width * image.height
        if image.format == "WEBP":
            self.pixels *= 2  # libwebp holds two frames of it beside Pillow's
        elif "progressive" in image.info:
            self.pixels = whole  # libjpeg holds the coefficients of all

    def decode(self) -> np.ndarray:
        """The photo turned upright, on white where it is transparent: uint8 (channels, size, size)."""
        with self._image as image:
            try:
                image.load()
                with suppress(Exception):  # damaged EXIF says nothing about orientation, and the pixels are sound
                    ImageOps.exif_transpose(image, in_place=True)
                return render(image, self._rule)
            except Exception:  # nor do decoders agree on what a damaged body raises
                raise ImageError(f"damaged or cut short: the {image.format} cannot be decoded to its end") from None


def decode(data: bytes, rule: ImageRule, limits: ImageLimits = LIMITS, formats: Sequence[str] = FORMATS) -> np.ndarray:
    """The photo in these bytes, turned upright, on white where it is transparent: uint8 (channels, size, size)."""
    return undecoded(data, rule, limits, formats).decode()


def undecoded(
    data: bytes, rule: ImageRule, limits: ImageLimits = LIMITS, formats: Sequence[str] = FORMATS
) -> Undecoded:
    """The photo in these bytes, as far as its header tells; an ImageError if it is not taken."""
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"{len(data):,} bytes; at most {limits.max_bytes:,} are taken")
    kinds = " or ".join([", ".join(formats[:-1])] * (len(formats) > 1) + [formats[-1]])
    try:
        image = Image.open(BytesIO(data), formats=tuple(formats))
    except UnidentifiedImageError:
        raise ImageError(f"not an image in a format that is taken ({kinds})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLargeError(f"far more than {limits.max_pixels:,} pixels") from None
    except Exception:  # a damaged header may raise anything
        raise ImageError(f"damaged: its header cannot be read as {kinds}") from None
    _check_size(image, limits)
    try:
        return Undecoded(image, rule)
    except Exception:
        raise ImageError(f"damaged or cut short: the {image.format} cannot be decoded to its end") from None


def render(image: Image.Image, rule: ImageRule) -> np.ndarray:
    """An image that is already decoded, by the rule: uint8 (channels, size, size)."""
    box, method = (rule.size, rule.size), Image.Resampling[rule.resize.upper()]
    fitted = []
    for plane in _planes(image, "L" if rule.channels == 1 else "RGB"):
        if plane.size != box:
            match rule.fit:
                case "squash":
                    plane = plane.resize(box, method)
                case "crop":
                    plane = ImageOps.fit(plane, box, method)
                case "pad":
                    plane = ImageOps.pad(plane, box, method, color="white")
        fitted.append(np.asarray(plane).reshape(rule.size, rule.size, -1))  # (H, W, 1), or (H, W, C) if it is alone
    pixels = np.concatenate(fitted, axis=2).transpose(2, 0, 1)  # (C, H, W)
    return np.ascontiguousarray(255 - pixels if rule.invert else pixels)


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    size = f"{width} x {height} pixels"
    most = limits.max_pixels if image.format == "JPEG" else min(limits.max_pixels, limits.max_pixels_whole)
    if width * height > most or max(width, height) > limits.max_side:
        raise ImageTooLargeError(
            f"{size}; at most {most:,} in all and {limits.max_side:,} a side are taken of a {image.format}"
        )
    if min(width, height) < limits.min_side:
        raise ImageError(f"{size}; at least {limits.min_side} a side are needed")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageError(f"{size}; the long side may be at most {limits.max_aspect:g} times the short one")


def _planes(image: Image.Image, mode: str) -> list[Image.Image]:
    """The same picture in mode L or RGB: as one image, or, of a large one that has to be flattened, as its channels.

    Each step of flattening would make another image of its size: a large one is flattened a strip of rows at a time.
    """
    width, height = image.size
    if width * height <= _STRIP or (image.mode in ("L", "RGB", "CMYK", "YCbCr") and "transparency" not in image.info):
        return [_flatten(image, mode)]
    planes, rows = [Image.new("L", image.size) for _ in mode], max(1, _STRIP // width)
    for top in range(0, height, rows):
        strip = _flatten(image.crop((0, top, width, min(height, top + rows))), mode)
        for plane, channel in zip(planes, strip.split(), strict=True):
            plane.paste(channel, (0, top))
    return planes


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """The same picture in mode L or RGB, without alpha, palette or more than 8 bits a channel."""
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them
        image = Image.fromarray((np.asarray(image).clip(0, 65535).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)
