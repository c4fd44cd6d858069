"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn once by 20 people.

Lake, Salakhutdinov and Tenenbaum, 2015. https://github.com/brendenlake/omniglot
"""

from __future__ import annotations

import hashlib
import json
import shutil
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from kshot import ImageRule, Importer, KshotError, Listing, Picture, Request, Split, hookimpl, list_images, random_split

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
# md5 of the official archives, and sha256 of their pixels, since a mirror may have recompressed the PNG files.
ARCHIVES = {
    "images_background.zip": (
        "68d2efa1b9178cc56df9314c21c6e718",
        "fb0ce911f536500330d2d056eff8bc1ed9cfd0b496548d339bd0525abaff9ce7",
    ),
    "images_evaluation.zip": (
        "6b91aef0f799c5bb55b94e3f2daec811",
        "d453ae1554aa759fd5e75e64f25ba329cf3cae046691e0562f9e8ed8d6b0c3fb",
    ),
}
SPLITS = {
    "vinyals": "1,028/172/423 characters, alphabets nearly apart (Vinyals et al.): what ProtoNet is measured on",
    "random": "1,100/100/423 characters at random: easier by 2 to 3 points at 20 ways",
    "background": "Lake's: 25 alphabets to train, 5 to validate, the 20 of the evaluation set to test",
}


@hookimpl
def kshot_datasets() -> dict[str, Importer]:
    return {
        "omniglot": Importer(
            about="1,623 handwritten characters of 50 alphabets, 20 drawings each",
            licence="MIT, Copyright (c) 2015 Brenden Lake",
            provenance="github.com/brendenlake/omniglot, images_background.zip and images_evaluation.zip",
            rule=ImageRule(size=28, channels=1, resize="lanczos", invert=True),
            open=_open,
            splits=SPLITS,
        )
    }


@contextmanager
def _open(request: Request) -> Iterator[Listing]:
    paths = [_archive(name, request) for name in ARCHIVES]
    with list_images(paths) as listing:
        # images_background/Greek/character01/0394_01.png
        characters = {p.name: (p.name.split("/")[0], "/".join(p.name.split("/")[1:-1])) for p in listing.pictures}
        split_of = _split(request, set(characters.values()))
        pictures = [
            Picture(p.name, characters[p.name][1], split_of[characters[p.name][1]], p.read) for p in listing.pictures
        ]
        yield Listing(pictures, listing.skipped)


def _split(request: Request, characters: set[tuple[str, str]]) -> dict[str, Split]:
    """The split of each Alphabet/characterNN."""
    names = sorted(character for _, character in characters)
    match request.split or "vinyals":
        case "random":
            return random_split(names, (1100, 100, 423), request.seed)
        case "background":
            alphabets = {a: {c.split("/")[0] for folder, c in characters if folder == f"images_{a}"}
                         for a in ("background", "evaluation")}  # fmt: skip
            side = random_split(sorted(alphabets["background"]), (25, 5, 0), request.seed)
            return {name: side.get(name.split("/")[0], "test") for name in names}
        case _:
            facts = json.loads(files(__package__).joinpath("omniglot_vinyals.json").read_text())
            listed: dict[str, Split] = {
                f"{alphabet}/character{number:02d}": split
                for split in ("train", "val", "test")
                for alphabet, numbers in facts[split].items()
                for number in numbers
            }
            return {name: listed[name] for name in names}


def _archive(name: str, request: Request) -> Path:
    """The archive from the user's folder, the download cache or its source, verified by checksum."""
    folder = request.folder or request.cache / "omniglot"
    path = folder / name
    if not path.exists():
        if request.folder:
            raise KshotError(f"{folder} has no {name}; Omniglot is {' and '.join(ARCHIVES)}, as at {URL}")
        _download(URL + name, path)
    md5, pixels = ARCHIVES[name]
    with path.open("rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() == md5:
            return path
    if (found := pixel_checksum(path)) != pixels:
        raise KshotError(f"{path} is not Omniglot's {name}: neither its md5 nor its pixels ({found[:12]}…) match. "
                         f"Delete it and fetch it again: {URL}{name}")  # fmt: skip
    return path


def pixel_checksum(path: Path) -> str:
    """sha256 over the names and the black-and-white pixels of all images of an archive."""
    checksum = hashlib.sha256()
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(n for n in archive.namelist() if n.endswith(".png")):
                with Image.open(BytesIO(archive.read(name)), formats=["PNG"]) as image:
                    checksum.update(f"{name} {image.size}\n".encode())
                    checksum.update(np.packbits(np.asarray(image.convert("1"))).tobytes())
    except Exception:  # zipfile, zlib and Pillow each have errors of their own
        return "unreadable"
    return checksum.hexdigest()


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, part.open("wb") as file:
            shutil.copyfileobj(response, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise KshotError(
            f"could not fetch {url}: {getattr(error, 'reason', error)}. Without a network, give the folder "
            "that holds the archive: --from DIR, or set KSHOT_MIRROR to the folder above it"
        ) from None
    part.replace(path)
