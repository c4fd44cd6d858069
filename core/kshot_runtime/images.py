"""The one way a photo becomes the array that a model sees: import, training, batch scripts and HTTP all decode here.

Hostile bytes are expected: formats are named, sizes are checked before pixels are decoded, and errors carry none of the
decoder's own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

from kshot_runtime.errors import KshotError

FORMATS = ("JPEG", "PNG", "WEBP")


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
    max_side: int = 12_000
    max_aspect: float = 25.0
    min_side: int = 8


LIMITS = ImageLimits()


def decode(data: bytes, rule: ImageRule, limits: ImageLimits = LIMITS, formats: Sequence[str] = FORMATS) -> np.ndarray:
    """The photo in these bytes, turned upright, on white where it is transparent: uint8 (channels, size, size)."""
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
    with image:
        _check_size(*image.size, limits)
        try:
            image.draft(None, (2 * rule.size, 2 * rule.size))  # a big JPEG is decoded at a fraction of its size
            image.load()
            return render(_upright(image), rule)
        except Exception:  # nor do decoders agree on what a damaged body raises
            raise ImageError(f"damaged or cut short: the {image.format} cannot be decoded to its end") from None


def render(image: Image.Image, rule: ImageRule) -> np.ndarray:
    """An image that is already decoded, by the rule: uint8 (channels, size, size)."""
    image = _flatten(image).convert("L" if rule.channels == 1 else "RGB")
    box, method = (rule.size, rule.size), Image.Resampling[rule.resize.upper()]
    if image.size != box:
        match rule.fit:
            case "squash":
                image = image.resize(box, method)
            case "crop":
                image = ImageOps.fit(image, box, method)
            case "pad":
                image = ImageOps.pad(image, box, method, color="white")
    pixels = np.array(image).reshape(rule.size, rule.size, rule.channels).transpose(2, 0, 1)  # (C, H, W)
    return np.ascontiguousarray(255 - pixels if rule.invert else pixels)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    size = f"{width} x {height} pixels"
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise ImageTooLargeError(
            f"{size}; at most {limits.max_pixels:,} in all and {limits.max_side:,} a side are taken"
        )
    if min(width, height) < limits.min_side:
        raise ImageError(f"{size}; at least {limits.min_side} a side are needed")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageError(f"{size}; the long side may be at most {limits.max_aspect:g} times the short one")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about orientation, and the pixels are sound
        return image


def _flatten(image: Image.Image) -> Image.Image:
    """The same picture in a mode without alpha, palette or more than 8 bits a channel."""
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them
        return Image.fromarray((np.asarray(image).clip(0, 65535).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB") if image.mode == "P" else image
