"""glyphs: a built-in data set of letters of many alphabets, drawn with matplotlib's fonts; needs no download.

A class is a letter; its images show it in several font faces, slightly rotated, shifted and scaled. Splits are by
alphabet. The bytes are the same for the same rendering of Pillow.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kshot import ImageRule, Importer, Listing, Picture, Request, Skipped, Split, hookimpl

SIDE = 28
IMAGES = 20  # of each letter
MIN_FACES = 4  # a letter that fewer faces have is left out
SAME = 0.9  # letters whose ink overlaps this much (intersection over union) in the first face are one drawing
_SCALE = 72  # the font size that letters are drawn at, before they are shrunk: hinting no longer matters

# Earlier alphabets keep a drawing that several share, such as the A of Latin, Greek and Cyrillic.
ALPHABETS: dict[str, tuple[Split, list[tuple[int, int]]]] = {
    "Latin": ("train", [(0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0xDF, 0x24F), (0x250, 0x2AF)]),
    "Cyrillic": ("train", [(0x400, 0x52F)]),
    "Canadian": ("train", [(0x1401, 0x1676)]),
    "Mathematical": ("train", [(0x2200, 0x22FF)]),
    "Arrows": ("train", [(0x2190, 0x21FF)]),
    "Armenian": ("val", [(0x531, 0x556), (0x561, 0x587)]),
    "Hebrew": ("val", [(0x5D0, 0x5EA)]),
    "Greek": ("test", [(0x391, 0x3C9), (0x3D0, 0x3FF)]),
    "Georgian": ("test", [(0x10A0, 0x10FF)]),
    "Arabic": ("test", [(0x621, 0x64A), (0x671, 0x6D5)]),
    "Lao": ("test", [(0xE81, 0xEDF)]),
}
FACES = [
    *(f"DejaVuSans{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
]


@hookimpl
def kshot_datasets() -> dict[str, Importer]:
    return {
        "glyphs": Importer(
            about="letters of many alphabets, drawn with matplotlib's fonts: no download",
            licence="drawn by kshot with DejaVu (Bitstream Vera licence) and STIX (its own free licence) fonts",
            provenance="kshot_plugins.glyphs",
            rule=ImageRule(size=SIDE, channels=1),
            open=_open,
            splits={"alphabets": ", ".join(f"{name} to {split}" for name, (split, _) in ALPHABETS.items())},
            embedded=True,
        )
    }


@contextmanager
def _open(request: Request) -> Iterator[Listing]:
    letters = [
        (alphabet, chr(code))
        for alphabet, (_, ranges) in ALPHABETS.items()
        for first, last in ranges
        for code in range(first, last + 1)
        if _is_plain(chr(code)) and len(_faces_with(chr(code))) >= MIN_FACES
    ]
    drawn_already = _same_drawings([letter for _, letter in letters])
    pictures, skipped = [], []
    for alphabet, letter in letters:
        label = f"{alphabet}/{_short_name(letter)}"
        if letter in drawn_already:
            other = unicodedata.name(drawn_already[letter]).lower()
            skipped.append(Skipped(name=label, why=f"the same drawing as {other}"))
            continue
        split = ALPHABETS[alphabet][0]
        pictures += [Picture(f"{label}/{i:02d}", label, split, partial(draw, letter, i)) for i in range(IMAGES)]
    yield Listing(pictures, skipped)


def draw(letter: str, number: int) -> Image.Image:
    """One image (28 x 28, bright ink) of a letter; face, size, angle and position depend only on the number."""
    chance = random.Random(ord(letter) * IMAGES + number)
    faces = random.Random(ord(letter)).sample(_faces_with(letter), len(_faces_with(letter)))
    ink = _ink(faces[number % len(faces)], letter)
    ink = ink.rotate(chance.uniform(-10, 10), Image.Resampling.BILINEAR, expand=True)
    ink = ink.crop(ink.getbbox())
    ink = _fit(ink, chance.randint(16, 22))
    image = Image.new("L", (SIDE, SIDE))
    image.paste(ink, (_place(ink.width, chance), _place(ink.height, chance)))
    return image


def _same_drawings(letters: list[str]) -> dict[str, str]:
    """Letters that look like an earlier letter (compared in the first face that has them), mapped to that letter."""
    shapes = np.stack([_shape(letter) for letter in letters])  # (letters, pixels) of 0 and 1: float sums are exact
    both = shapes @ shapes.T  # (letters, letters) pixels that two have in common
    inked = shapes.sum(axis=1)
    overlap = both / (inked[:, None] + inked[None, :] - both)
    same: dict[str, str] = {}
    for i, letter in enumerate(letters):
        earlier = next((j for j in np.flatnonzero(overlap[i, :i] >= SAME) if letters[j] not in same), None)
        if earlier is not None:
            same[letter] = letters[earlier]
    return same


def _shape(letter: str) -> np.ndarray:
    """The letter's ink, centred in a square, as zeros and ones (pixels,)."""
    ink = _fit(_ink(_faces_with(letter)[0], letter), SIDE)
    square = Image.new("L", (SIDE, SIDE))
    square.paste(ink, ((SIDE - ink.width) // 2, (SIDE - ink.height) // 2))
    return (np.asarray(square).ravel() > 127).astype(np.float32)


def _place(length: int, chance: random.Random) -> int:
    """Start coordinate of an object of this length: centred with a small random shift, inside the image."""
    room = SIDE - length
    return min(max(room // 2 + chance.randint(-2, 2), 0), room)


@cache
def _fonts() -> dict[str, tuple[ImageFont.FreeTypeFont, frozenset[int]]]:
    """Font faces with the characters that they contain; others would be drawn as a box."""
    import matplotlib
    from fontTools.ttLib import TTFont

    fonts = {}
    for face in FACES:
        path = Path(matplotlib.get_data_path(), "fonts", "ttf", face)
        with TTFont(path, lazy=True) as font:
            characters = frozenset(font.getBestCmap())
        fonts[face] = (ImageFont.truetype(path, _SCALE, layout_engine=ImageFont.Layout.BASIC), characters)
    return fonts


@cache
def _faces_with(letter: str) -> list[str]:
    return [face for face, (_, characters) in _fonts().items() if ord(letter) in characters]


def _is_plain(letter: str) -> bool:
    """Whether a character is an assigned letter, digit or sign, and not an accent, ligature or combining mark."""
    return unicodedata.category(letter) in ("Lu", "Ll", "Lo", "Nd", "Sm", "So") and not unicodedata.decomposition(
        letter
    )


def _short_name(letter: str) -> str:
    words = unicodedata.name(letter).lower().split()
    return " ".join(word for word in words if word not in ("latin", "cyrillic", "canadian", "syllabics", "armenian",
                    "hebrew", "greek", "georgian", "arabic", "lao", "letter"))  # fmt: skip


@cache
def _ink(face: str, letter: str) -> Image.Image:
    """The letter at full size, cut to its ink."""
    font, _ = _fonts()[face]
    canvas = Image.new("L", (4 * _SCALE, 4 * _SCALE))
    ImageDraw.Draw(canvas).text((2 * _SCALE, 2 * _SCALE), letter, 255, font, anchor="mm")
    return canvas.crop(canvas.getbbox())


def _fit(ink: Image.Image, long_side: int) -> Image.Image:
    scale = long_side / max(ink.size)
    size = (max(round(ink.width * scale), 1), max(round(ink.height * scale), 1))
    return ink.resize(size, Image.Resampling.BOX)
