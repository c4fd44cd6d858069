"""mini-ImageNet: 100 classes of photographs at 84 x 84, in the split of Ravi and Larochelle, 2017.

The images are ImageNet's and may not be redistributed, so users provide a copy: https://openreview.net/forum?id=rJY0-Kcll
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from kshot import ImageRule, Importer, KshotError, Listing, Picture, Request, Split, hookimpl, list_images


@hookimpl
def kshot_datasets() -> dict[str, Importer]:
    return {
        "mini-imagenet": Importer(
            about="100 classes of photographs; --from a folder of class folders, or of train.zip, val.zip and test.zip",
            licence="ImageNet's terms: research and education only, no redistribution",
            provenance="ILSVRC 2012, the classes of Vinyals et al. 2016 as split by Ravi and Larochelle 2017",
            rule=ImageRule(size=84),
            open=_open,
            splits={"ravi": "64/16/20 classes of Ravi and Larochelle"},
        )
    }


@contextmanager
def _open(request: Request) -> Iterator[Listing]:
    if request.folder is None:
        raise KshotError(
            "mini-ImageNet cannot be downloaded: its licence forbids copies. Give the folder of your copy: --from DIR"
        )
    facts: dict[Split, list[str]] = json.loads(files(__package__).joinpath("mini_imagenet_ravi.json").read_text())
    split_of = {wnid: split for split, wnids in facts.items() for wnid in wnids}
    with list_images(_parts(request.folder)) as listing:
        pictures = []
        for picture in listing.pictures:
            wnid = picture.label.split("/")[-1]
            if wnid not in split_of:
                raise KshotError(f"{picture.name}: {wnid!r} is none of the 100 classes of mini-ImageNet")
            if picture.split not in (None, split_of[wnid]):
                raise KshotError(f"{picture.name}: class {wnid} belongs to {split_of[wnid]}, not {picture.split}")
            pictures.append(Picture(picture.name, wnid, split_of[wnid], picture.read))
        if missing := split_of.keys() - {p.label for p in pictures}:
            raise KshotError(
                f"{request.folder} lacks {len(missing)} of the 100 classes of mini-ImageNet: {min(missing)}…"
            )
        yield Listing(pictures, listing.skipped)


def _parts(folder: Path) -> list[Path]:
    zips = [folder / f"{split}.zip" for split in ("train", "val", "test")]
    return zips if all(path.exists() for path in zips) else [folder]
