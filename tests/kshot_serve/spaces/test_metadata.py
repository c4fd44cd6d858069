"""Metadata that is taken out of photos: nothing of it is left in the bytes, and the pixels are the same ones."""

from __future__ import annotations

import asyncio
import contextlib
import io
import sqlite3
import struct
import zlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from kshot_serve.errors import Problem
from kshot_serve.settings import Settings
from kshot_serve.spaces.metadata import stripped

SECRETS = [b"GPS-52.5163N", b"xmp-secret", b"comment-secret", b"iptc-secret", b"trailer-secret"]
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>xmp-secret</x:xmpmeta>"


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "GPS-52.5163N"
    exif.get_ifd(0x8825)[0x1D] = "GPS-52.5163N"
    return exif


def _picture(mode: str) -> Image.Image:
    pixels = 16 * np.random.default_rng(0).integers(0, 16, (37, 52, 4), np.uint8)  # which a PNG can compress
    return Image.fromarray(pixels, "RGBA").convert(mode)


def _photo(kind: str, mode: str, orientation: int, **options: Any) -> bytes:
    """A photo with as many kinds of metadata as its format has."""
    file = io.BytesIO()
    exif = _exif(orientation).tobytes()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if kind == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", "comment-secret", zip=False)
        text.add_itxt("XML:com.adobe.xmp", XMP.decode())
        options |= {"pnginfo": text, "compress_level": 0}  # so that it would differ, were it encoded again
    else:
        options["xmp"] = XMP
    if kind == "JPEG":
        options["comment"] = b"comment-secret"
    if mode in ("RGB", "RGBA"):
        options["icc_profile"] = profile
    _picture(mode).save(file, kind, exif=exif, **options)
    content = file.getvalue()
    if kind == "JPEG":
        iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x0biptc-secret\0"
        content = content[:2] + b"\xff\xed" + struct.pack(">H", len(iptc) + 2) + iptc + content[2:]
    if kind == "PNG":
        secret = b"prVtiptc-secret"
        content = content[:33] + struct.pack(">I", 11) + secret + struct.pack(">I", zlib.crc32(secret)) + content[33:]
    return content + b"trailer-secret"


def _upright(photo: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(photo)) as image:
        return np.asarray(ImageOps.exif_transpose(image))


CASES = [
    ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"restart_marker_blocks": 1}), ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {}),
    ("WEBP", "RGB", {"lossless": True}), ("WEBP", "RGBA", {}),
]  # fmt: skip


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("kind", "mode", "options"), CASES)
def test_nothing_of_the_metadata_is_left_and_every_pixel_is(
    kind: str, mode: str, options: dict[str, Any], orientation: int
) -> None:
    photo = _photo(kind, mode, orientation, **options)
    assert sum(secret in photo for secret in SECRETS) >= 3
    bare = stripped(photo)
    assert [secret for secret in SECRETS if secret in bare] == []
    assert np.array_equal(_upright(bare), _upright(photo))
    with Image.open(io.BytesIO(photo)) as before, Image.open(io.BytesIO(bare)) as after:
        assert after.info.get("icc_profile") == before.info.get("icc_profile")
        assert dict(after.getexif()) == ({} if orientation == 1 else {0x0112: orientation})
    assert stripped(bare) == bare
    assert bare[len(bare) // 2 :][:200] in photo  # not encoded again


def test_an_orientation_that_only_xmp_tells_of_stays() -> None:
    file = io.BytesIO()
    _picture("RGB").save(file, "JPEG", xmp=b"<x tiff:Orientation='8'/>")
    bare = stripped(file.getvalue())
    assert np.array_equal(_upright(bare), _upright(file.getvalue()))
    assert b"tiff:" not in bare


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_photo_that_was_cut_short_is_refused_or_stripped_and_never_left_as_it_was(cut: int) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        photo = _photo(kind, "RGB", 6)
        for content in (photo[:-cut], photo[:cut]):
            with contextlib.suppress(Problem):
                assert [secret for secret in SECRETS if secret in stripped(content)] == []


@pytest.mark.parametrize("strip", [True, False])
def test_a_server_told_so_keeps_shows_and_exports_photos_without_metadata(
    features_bundle: Path, tmp_path: Path, running: Callable[[Settings], AbstractContextManager[Any]], strip: bool
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, strip_metadata=strip)
    photo = _photo("JPEG", "RGB", 6)
    with running(settings) as server:
        space = server.http.post("/v1/spaces", json={"name": "s"}).json()["id"]
        files = [("photos", ("photo", photo))]
        added = server.http.post(f"/v1/spaces/{space}/classes", data={"name": "c"}, files=files).json()
        again = server.http.post(f"/v1/spaces/{space}/classes/{added['class']['id']}/photos", files=files).json()
        assert "is in this class already" in again["notes"][0]
        shown = server.http.get(f"/v1/spaces/{space}/photos/{added['photos'][0]}").content
        exported = server.http.get(f"/v1/spaces/{space}/export").content
        imported = server.http.post("/v1/spaces/import", content=exported, headers={"Content-Type": "application/zip"})
        assert imported.status_code == 201
    assert (shown == photo) is not strip
    with sqlite3.connect(tmp_path / "spaces.db") as database:
        [stored] = database.execute("SELECT content FROM contents WHERE kind = 'original' LIMIT 1").fetchone()
    for content in (shown, exported, stored):
        assert (b"GPS-52.5163N" in content) is not strip


def test_photos_from_before_the_option_are_as_they_were(
    features_bundle: Path, tmp_path: Path, parts: Callable[..., AbstractAsyncContextManager[Any]]
) -> None:
    photos = [_photo("JPEG", "RGB", orientation) for orientation in (1, 6)]

    async def added(strip: bool) -> list[bytes]:
        async with parts(features_bundle, tmp_path, strip_metadata=strip) as there:
            space = await there.spaces.named("s")
            await there.spaces.add(space.id, "c", [there.upload(photos[strip])])
            [class_] = (await there.spaces.classes(space.id))[1]
            return [(await there.spaces.photo(space.id, each.id))[0] for each in class_.photos]

    assert asyncio.run(added(False)) == photos[:1]
    assert asyncio.run(added(True)) == [photos[0], stripped(photos[1])]
