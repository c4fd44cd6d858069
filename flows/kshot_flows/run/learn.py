"""`kshot learn`: runs the recipe `photos` on a folder of photos, with episode sizes that the photos allow."""

from __future__ import annotations

import hashlib
import json
import re
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape

from kshot import malloc
from kshot.data.datasets import INDEX, ImageSet
from kshot.data.importing import ImportReport, Progress, import_dataset
from kshot.data.sources import list_images
from kshot.recipe import Recipe
from kshot_flows import project, recipes
from kshot_flows.console import progress
from kshot_flows.data import versioning
from kshot_flows.store import embeddings
from kshot_runtime.errors import KshotError

RECIPE = "photos"
FEW_CLASSES = 8  # with fewer classes none is held out for testing: accuracy is cross-validated
MANY_PHOTOS = 5  # photos per class of the second reported accuracy; the first is at one photo


@dataclass(frozen=True)
class Photos:
    """The properties of a data set that determine the settings of `kshot learn`."""

    name: str
    classes: int
    tested: int  # held-out test classes
    photos: int
    fewest: int  # number of photos of the smallest class

    @classmethod
    def of(cls, found: ImageSet) -> Photos:
        counts = [entry.count for entry in found.classes]
        return cls(found.name, len(counts), found.splits.get("test", 0), sum(counts), min(counts))


def bring_in(source: str, name: str | None, group_by: str | None, size: int) -> Photos:
    """The data set of a folder or zip, imported unless it is unchanged; or an existing data set by name."""
    root, path = versioning.data_root(), Path(source)
    if not path.exists():
        return Photos.of(ImageSet.open(root / source))
    name = name or re.sub(r"[^a-z0-9._-]+", "-", path.name.removesuffix(".zip").lower()).strip("-._") or "photos"
    note = project.home() / ".kshot" / "sources" / f"{name}.json"
    now: dict[str, Any] = {"fingerprint": fingerprint(path), "group_by": group_by, "size": size}
    if (root / name / INDEX).exists() and note.exists() and json.loads(note.read_text()) == now:
        return Photos.of(ImageSet.open(root / name))
    if (root / name / INDEX).exists() and not note.exists():
        raise KshotError(
            f"there is a data set {name!r} already, which `kshot learn` has not made. Give this one another name "
            f"(--name), or learn from that one: kshot learn {name}"
        )
    with progress.counting(f"reading {path.name}") as watch:
        for event in import_dataset(
            str(path),
            name,
            root,
            rule={"size": size, "fit": "crop"},
            split=_split(path),
            group_by=group_by,
            replace=True,
        ):
            if isinstance(event, Progress):
                watch(event)
            else:
                _tell(event)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(now))
    return Photos.of(ImageSet.open(root / name))


def fingerprint(path: Path) -> str:
    """A fingerprint of a folder's files or of a zip, which changes when they change."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(
        (str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in path.rglob("*") if f.is_file()
    )
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _split(path: Path) -> str | None:
    """The shares of classes to learn from and to test on; None if the folders define the split."""
    with list_images([path]) as listing:
        if all(picture.split for picture in listing.pictures):
            return None
        classes = len({picture.label for picture in listing.pictures})
    tested = 0 if classes < FEW_CLASSES else max(3, classes // 4)
    return f"{classes - tested}/0/{tested}"


def changes(photos: Photos, chosen: Sequence[str], backbone: str | None, across: bool) -> list[str]:
    """Recipe overrides that follow from the photos and the command's options."""
    if photos.classes < 3 or photos.fewest < 2:
        raise KshotError(
            f"{photos.name} has {photos.classes} classes, the smallest with {photos.fewest} photos. Choosing a head, "
            "and saying how good it is, takes 3 classes of 2 photos at least: add classes of similar things. To serve "
            "only these, take a bundle that exists: kshot serve BUNDLE --space FOLDER"
        )
    tested = photos.tested or photos.classes
    shots = [1, MANY_PHOTOS] if photos.fewest > MANY_PHOTOS else sorted({1, max(1, photos.fewest - 1)})
    queries = min(5, photos.fewest - max(shots))
    ways = min(5, tested - 1) if tested > 2 else 2
    values = {
        "name": photos.name,
        "dataset.name": photos.name,
        "training.ways": max(2, ways),
        "training.shots": shots,
        "training.queries": queries,
        "evaluation.ways": [max(2, ways)],
        "evaluation.shots": shots,
        "evaluation.queries": queries,
        **({} if photos.tested else {"dataset.test": "train"}),
        **({"dataset.across_groups": True} if across else {}),
        **({"backbone.name": backbone} if backbone else {}),
        **({"learner.name": list(chosen)} if chosen else {}),
    }
    return [f"{key}={_text(value)}" for key, value in values.items()]


def _text(value: Any) -> str:
    """A value as an override: words are quoted only if they would otherwise be parsed as another type."""
    try:
        return json.dumps(value) if not isinstance(value, str) or tomllib.loads(f"value = {value}") else value
    except tomllib.TOMLDecodeError:
        return value


def announce(photos: Photos, settings: Sequence[str]) -> None:
    """Print the data set, and the expected time and memory, before the start."""
    recipe = recipes.load(RECIPE, settings)
    image = ImageSet.open(versioning.data_root() / photos.name)
    seconds = _seconds_an_image(recipe.variants()[0], image)
    tried = len(recipe.learner.names)
    total = seconds * photos.photos + 15 * tried + 40
    gigabytes = 1.2 + 4 * photos.photos * 6000 / 1e9
    progress.say(
        escape(
            f"{photos.photos:,} photos of {photos.classes} classes. Each is embedded once, in {1000 * seconds:.0f} ms; "
            f"with choosing a head, export and all, the first run takes about {max(1, round(total / 60))} min and "
            f"{gigabytes:.1f} GB of memory."
        )
    )


def _seconds_an_image(recipe: Recipe, images: ImageSet) -> float:
    backbone = recipe.build_backbone(images.rule.shape).eval().to(embeddings.device())
    few = torch.from_numpy(np.array(images.images[:8])).to(embeddings.device()) / 255
    with torch.no_grad(), malloc.kept():
        backbone(few[:1])
        began = time.perf_counter()
        backbone(few)
    return (time.perf_counter() - began) / len(few)


def advice(photos: Photos) -> list[str]:
    """Sentences on what more photos or classes would improve."""
    found = []
    if not photos.tested:
        found.append(
            f"With {photos.classes} classes none is set aside, so the figures are of classes that the head was chosen "
            f"on, and may flatter. From {FEW_CLASSES} classes on, some are kept for figures alone."
        )
    if photos.classes - photos.tested < 14:
        found.append(
            f"The statistics come from {photos.classes - photos.tested} classes. More classes of similar things, which "
            "need not be those that you want to recognise, make them better, most of all at telling what is unknown."
        )
    if photos.fewest <= MANY_PHOTOS:
        found.append(
            f"The smallest class has {photos.fewest} photos. With {MANY_PHOTOS + 1} and more of each, the figures "
            f"cover {MANY_PHOTOS} photos a class, where answers are much surer than with one."
        )
    return found


def _tell(report: ImportReport) -> None:
    for one in report.skipped[:5]:
        progress.say(escape(f"  left out {one.name}: {one.why}"))
    if len(report.skipped) > 5:
        progress.say(f"  and {len(report.skipped) - 5} more; data/{report.folder.name}/index.json lists all")
    if report.duplicates:
        progress.say(f"  {len(report.duplicates)} photos are there twice or more, to the byte")


def write_recipe(settings: Sequence[str], file: Path) -> None:
    """Write the recipe with these settings to a file."""
    if file.exists():
        raise KshotError(f"{file} is there already. Choose another name, or remove it.")
    recipe = Recipe.load(recipes.find(RECIPE), recipes.changes(settings))
    content = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    lines = [
        f"# kshot run {file}",
        "# Written by `kshot learn`: a head on a frozen backbone, chosen by folds over classes.",
        "",
    ]
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    lines += [f"{key} = {json.dumps(value)}" for key, value in content.items() if key not in tables]
    for key, table in tables.items():
        lines += ["", f"[{key}]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
    file.write_text("\n".join(lines) + "\n")


def fill(url: str, key: str | None, source: str, name: str) -> None:
    """Create or complete a label space on a server from the photos of a folder or zip."""
    from kshot_client import Client, ClientError

    try:
        with Client(url, key) as client, progress.busy(f"filling the label space {name} at {url}"):
            filling = client.space(name).fill(source)
    except ClientError as error:
        raise KshotError(str(error)) from None
    progress.say(f"[bold]Label space[/bold]  {name} at {url}: {filling.added} photos added")
    for line in filling.skipped[:5]:
        progress.say(escape(f"  left out {line}"))
