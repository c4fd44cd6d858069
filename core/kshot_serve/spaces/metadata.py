"""Photos without their metadata: EXIF with GPS, XMP, IPTC, comments and trailers go; the pixels are not encoded again.

What a decoder needs stays: colour profiles, and of EXIF the orientation alone.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from kshot_serve.errors import Problem

_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset(
    b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB iCCP cICP sBIT bKGD pHYs acTL fcTL fdAT".split()
)  # what pixels and colours are made of
_WEBP_KEPT = frozenset([b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP"])
_WEBP_EXIF, _WEBP_XMP = 0x08, 0x04  # flags of VP8X
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # not a stuffed byte, nor a restart in the middle of a scan


def stripped(photo: bytes) -> bytes:
    """A JPEG, PNG or WebP that decodes to the same pixels, without metadata. One that cannot be parsed is a Problem."""
    try:
        with Image.open(io.BytesIO(photo)) as image:
            orientation = _orientation(image)
        if photo.startswith(b"\xff\xd8"):
            return b"".join(_jpeg(photo, _exif(orientation)))
        return b"".join(_png(photo, orientation)) if photo.startswith(_PNG) else _webp(photo, orientation)
    except (ValueError, IndexError, struct.error, OSError):
        raise Problem("not_an_image", "damaged: its metadata cannot be taken out, and this server keeps none") from None


def _orientation(image: Image.Image) -> int:
    """As decoding reads it, which may be from EXIF or XMP; 1 is upright."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises many kinds on damaged EXIF, and decoding takes such a photo as upright
        return 1
    return value if value in range(1, 9) else 1


def _exif(orientation: int) -> bytes:
    """A TIFF header with the orientation as its only tag; nothing if the photo is upright."""
    if orientation == 1:
        return b""
    return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, _ORIENTATION, 3, 1, orientation, 0, 0)


def _jpeg(photo: bytes, exif: bytes) -> Iterator[bytes]:
    yield b"\xff\xd8"
    if exif:
        yield b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
    at = 2
    while (found := _MARKER.search(photo, at)) is not None:
        kind, start = found[1][0], found.end()
        if kind == 0xD9:  # the end: what follows is a trailer, such as other pictures or a film
            yield b"\xff\xd9"
            return
        end = start + struct.unpack_from(">H", photo, start)[0]
        if end > len(photo):
            raise ValueError("a segment is longer than the file")
        content = photo[start + 2 : end]
        kept = not (0xE1 <= kind <= 0xEF or kind == 0xFE)
        colours = (kind == 0xE2 and content.startswith(b"ICC_PROFILE\0")) or (kind == 0xEE and content[:5] == b"Adobe")
        if kept or colours:
            yield photo[start - 2 : end]
        at = end
        if kind == 0xDA:  # a scan lasts until the next marker
            following = _MARKER.search(photo, at)
            at = following.start() if following else len(photo)
            yield photo[end:at]


def _png(photo: bytes, orientation: int) -> Iterator[bytes]:
    yield _PNG
    at = len(_PNG)
    while at < len(photo):
        length, kind = struct.unpack_from(">I4s", photo, at)
        chunk = photo[at : at + 12 + length]
        if kind in _PNG_KEPT:
            yield chunk
        if kind == b"IHDR" and (exif := _exif(orientation)):
            yield struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
        if kind == b"IEND":
            return
        at += len(chunk)


def _webp(photo: bytes, orientation: int) -> bytes:
    chunks, at = [], 12
    whole = 8 + struct.unpack_from("<I", photo, 4)[0]
    exif = _exif(orientation)
    while at + 8 <= min(whole, len(photo)):
        kind, length = struct.unpack_from("<4sI", photo, at)
        chunk = photo[at : at + 8 + length + length % 2]
        if kind == b"VP8X":
            flags = chunk[8] & ~(_WEBP_EXIF | _WEBP_XMP) | (_WEBP_EXIF if exif else 0)
            chunk = chunk[:8] + bytes([flags]) + chunk[9:]
        if kind in _WEBP_KEPT:
            chunks.append(chunk)
        at += len(chunk)
    if exif and chunks[0].startswith(b"VP8X"):
        chunks.append(struct.pack("<4sI", b"EXIF", len(exif)) + exif)
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body
