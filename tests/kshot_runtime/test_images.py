"""The one decode: orientation, modes, fits, and every way in which a file can be bad."""

import contextlib
import itertools
import struct
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from kshot_runtime.errors import KshotError
from kshot_runtime.images import ImageError, ImageLimits, ImageRule, ImageTooLargeError, decode, undecoded

GREY = ImageRule(size=16, channels=1)
COLOUR = ImageRule(size=16)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def quadrants(side: int = 32) -> Image.Image:
    """Red, green / blue, white: no turning or mirroring leaves it as it is."""
    pixels = np.zeros((side, side, 3), np.uint8)
    half = side // 2
    pixels[:half, :half, 0] = pixels[:half, half:, 1] = pixels[half:, :half, 2] = 255
    pixels[half:, half:] = 255
    return Image.fromarray(pixels)


def test_shape_is_channels_then_rows_then_columns():
    assert decode(encoded(quadrants()), COLOUR).shape == COLOUR.shape == (3, 16, 16)
    assert decode(encoded(quadrants()), GREY).shape == GREY.shape == (1, 16, 16)
    assert decode(encoded(quadrants()), COLOUR).dtype == np.uint8
    assert decode(encoded(quadrants()), COLOUR)[:, 2, 2].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("orientation", "stored_as"),
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_photos_are_turned_upright_as_their_exif_says(orientation, stored_as):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(quadrants().transpose(stored_as), exif=exif)
    assert np.array_equal(decode(data, COLOUR), decode(encoded(quadrants()), COLOUR))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_lose_the_photo():
    data = encoded(quadrants(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert decode(data, COLOUR).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"),
        ("L", "JPEG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("RGBA", "WEBP"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rule", [GREY, COLOUR])
def test_every_mode_gives_the_same_picture(mode, kind, rule):
    half = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 16, 0).repeat(32, 1))  # black above white
    if mode == "I;16":
        image = Image.fromarray(np.asarray(half).astype(np.uint16) * 257)
    else:
        image = half.convert("RGB").convert(mode)
    pixels = decode(encoded(image, kind, **({"quality": 95} if kind != "PNG" else {})), rule)
    assert pixels[:, :7].max() < 6
    assert pixels[:, 9:].min() > 249


def test_sixteen_bits_are_scaled_and_not_clipped():
    grey = Image.fromarray(np.full((16, 16), 128 * 257, np.uint16))
    assert (decode(encoded(grey), GREY) == 128).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_what_is_transparent_becomes_white(mode):
    if mode == "P":
        image = Image.new("P", (16, 16), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        data = encoded(image, transparency=0)
    else:
        data = encoded(Image.new(mode, (16, 16), 0))
    assert (decode(data, COLOUR) == 255).all()


def test_transparency_of_one_colour_becomes_white():
    data = encoded(Image.new("RGB", (16, 16), (1, 2, 3)), transparency=(1, 2, 3))
    assert (decode(data, COLOUR) == 255).all()


def test_inverted_ink_is_bright():
    paper = Image.new("L", (16, 16), 255)
    assert (decode(encoded(paper), GREY.model_copy(update={"invert": True})) == 0).all()


def test_fits():
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste((0, 0, 255), (10, 0, 30, 20))  # red, blue, blue, red
    red, blue, white = [255, 0, 0], [0, 0, 255], [255, 255, 255]

    def at(fit: str, row: int, column: int) -> list[int]:
        return decode(encoded(wide), ImageRule(size=20, fit=fit, resize="nearest"))[:, row, column].tolist()

    assert at("squash", 10, 2) == red
    assert at("crop", 10, 2) == blue
    assert at("pad", 2, 2) == white
    assert at("pad", 10, 2) == red


def test_an_image_of_the_right_size_is_not_filtered():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(decode(encoded(Image.fromarray(noise)), COLOUR), noise.transpose(2, 0, 1))


def test_a_big_jpeg_is_decoded_at_a_fraction_and_looks_the_same():
    big = quadrants(1024)
    small, whole = decode(encoded(big, "JPEG", quality=95), COLOUR), decode(encoded(big), COLOUR)
    assert abs(small.astype(int) - whole.astype(int)).max() < 16


@pytest.mark.parametrize("size", [(61, 47), (30, 90)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "RGB"])
def test_a_large_image_is_flattened_in_strips_to_the_same_pixels(mode, size, monkeypatch):
    """So that a bundle answers as it did before: composited on white first, and then resized."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (size[1], size[0], 4), np.uint8))
    options = {"transparency": 3} if mode == "P" else {"transparency": (1, 2, 3)} if mode == "RGB" else {}
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 65536, size[::-1], np.uint16))
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode) if mode == "P" else image.convert(mode)
    data = encoded(image, **options)
    for fit, channels, resize in itertools.product(
        ("squash", "crop", "pad"), (1, 3), ("lanczos", "bicubic", "bilinear", "box", "nearest")
    ):
        rule = ImageRule(size=20, channels=channels, fit=fit, resize=resize)
        whole = decode(data, rule)
        monkeypatch.setattr("kshot_runtime.images._STRIP", 150)
        assert np.array_equal(decode(data, rule), whole)
        monkeypatch.undo()


def test_a_png_or_webp_may_have_a_limit_of_its_own():
    limits = ImageLimits(max_pixels_whole=40 * 40)
    for kind in ("PNG", "WEBP"):
        decode(encoded(quadrants(40), kind), GREY, limits)
        with pytest.raises(ImageTooLargeError, match="44 x 44 pixels; at most 1,600 in all"):
            decode(encoded(quadrants(44), kind), GREY, limits)
    decode(encoded(quadrants(44), "JPEG"), GREY, limits)


def test_what_decoding_takes_of_memory_is_known_from_the_header():
    """A JPEG is decoded at a fraction of its size, but of a progressive one libjpeg holds all coefficients."""
    sizes = {
        kind: undecoded(encoded(quadrants(512), kind, **options), COLOUR).pixels
        for kind, options in (("PNG", {}), ("WEBP", {}), ("JPEG", {}), ("JPEG", {"progressive": True}))
    }
    assert sizes == {"PNG": 512**2, "WEBP": 2 * 512**2, "JPEG": 512**2}
    assert undecoded(encoded(quadrants(512), "JPEG"), COLOUR).pixels == 64**2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_file_cut_short_is_refused(kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(ImageError, match=r"damaged|not an image"):
        decode(data[: int(len(data) * share)], COLOUR)


@pytest.mark.parametrize("data", [b"", b"hello, I am a text file\n" * 9, b"\x89PNG\r\n\x1a\n" + b"\0" * 99])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ImageError):
        decode(data, COLOUR)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM"])
def test_other_formats_are_refused_unless_named(kind):
    data = encoded(quadrants(), kind)
    with pytest.raises(ImageError, match="JPEG, PNG or WEBP"):
        decode(data, COLOUR)
    assert decode(data, COLOUR, formats=(kind,)).shape == (3, 16, 16)


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (7, 400), (8, 400)])
def test_specks_and_ribbons_are_refused(size):
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels"):
        decode(encoded(Image.new("L", size)), GREY)


def test_too_many_bytes_are_refused_unread():
    with pytest.raises(ImageTooLargeError, match="21 bytes; at most 20"):
        decode(b"x" * 21, GREY, ImageLimits(max_bytes=20))


def png_that_claims(width: int, height: int) -> bytes:
    """A few kilobytes that would decode to width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (height * (1 + (width + 7) // 8)), 9)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [(6000, 5000), (12_001, 1000), (9500, 9500), (12_000, 12_000), (20_000, 20_000)])
def test_a_decompression_bomb_is_refused_whatever_pillow_thinks_of_it(size):
    with pytest.raises(ImageTooLargeError):
        decode(png_that_claims(*size), GREY)


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_a_decompression_bomb_costs_no_memory(tmp_path):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_that_claims(12_000, 12_000))
    assert bomb.stat().st_size < 20_000
    script = """
import resource, sys, warnings
from kshot_runtime.images import ImageRule, ImageTooLargeError, decode, undecoded
warnings.simplefilter("ignore")
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(data, ImageRule(size=28))
except ImageTooLargeError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script, str(bomb)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # kilobytes


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_a_large_png_with_alpha_is_decoded_without_further_copies_of_its_size(tmp_path):
    """25 megapixels are 100 MB in Pillow; composited as a whole they took 488 MB."""
    photo = tmp_path / "large.png"
    photo.write_bytes(encoded(Image.new("RGBA", (5000, 5000), (9, 8, 7, 100)), compress_level=1))
    script = """
import resource, sys
from kshot_runtime.images import ImageRule, decode
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode(data, ImageRule(size=28))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script, str(photo)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 220_000  # kilobytes


def test_errors_carry_nothing_of_the_decoders_insides():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for data in (b"", b"junk" * 50, encoded(noise, "JPEG")[:900], encoded(noise)[:900]):
        with pytest.raises(KshotError) as caught:
            decode(data, COLOUR)
        assert "0x" not in str(caught.value)
        assert "<" not in str(caught.value)


def test_random_bytes_after_a_real_header_never_escape_as_another_error():
    random = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = bytearray(encoded(quadrants(64), kind))
        for _ in range(60):
            data = bytearray(whole)
            for position in random.integers(0, len(data), 8):
                data[position] = random.integers(256)
            with contextlib.suppress(ImageError):
                assert decode(bytes(data), COLOUR).shape == (3, 16, 16)


def test_a_rule_is_frozen_and_refuses_what_it_does_not_know():
    with pytest.raises(ValidationError):
        ImageRule(size=28, colour="red")
    with pytest.raises(ValidationError):
        GREY.size = 5
    assert ImageRule.model_validate_json(GREY.model_dump_json()) == GREY
