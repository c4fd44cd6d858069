"""Imports the images of a folder, a zip or a plugin's source as a packed data set; on failure leaves no files.

`kshot_runtime.images` decodes each picture. Files that are not imported are listed with the reason.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from pydantic import ValidationError

from kshot import atomic
from kshot.data.contact_sheet import contact_sheet
from kshot.data.datasets import IMAGES, INDEX, SHEET, ClassEntry, FileEntry, ImageSet, Index, Skipped, file_sha256
from kshot.data.sources import Importer, Picture, Request, Split, grouped, list_images, random_split
from kshot_runtime.errors import KshotError
from kshot_runtime.images import ImageError, ImageRule, decode, render

FRACTIONS = (0.6, 0.2, 0.2)  # of the classes for train, val and test, if a source has no splits
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Progress:
    done: int
    total: int
    what: str


@dataclass(frozen=True)
class ImportReport:
    """The result of an import; check `skipped` and `duplicates`."""

    folder: Path
    version: str
    images: int
    splits: Mapping[str, int]  # classes in each
    skipped: Sequence[Skipped]
    duplicates: Sequence[tuple[str, ...]]  # groups of identical files
    leaks: Sequence[tuple[str, ...]]  # duplicates that are in more than one split
    groups: Mapping[str, int]  # number of groups of each class, if groups are known

    @property
    def sheet(self) -> Path:
        return self.folder / SHEET


def import_dataset(
    source: str,
    name: str,
    root: Path,
    *,
    from_dir: Path | None = None,
    rule: Mapping[str, Any] | None = None,
    split: str | None = None,
    seed: int = 0,
    min_images: int = 2,
    group_by: str | None = None,
    allow_leaks: bool = False,
    replace: bool = False,
) -> Iterator[Progress | ImportReport]:
    """Pack `source` (a folder, a zip, or a plugin's source by name) as `root/name`; yields progress, then the report.

    `rule` overrides fields of the source's ImageRule. `from_dir` is the folder with a named source's archives, by
    default `$KSHOT_MIRROR/<source>`. For a folder or a zip without splits, `split` gives the fractions of classes in
    train/val/test, such as `0.6/0.2/0.2`. `group_by` defines which pictures belong together (see
    `kshot.data.sources.grouped`). Identical files in two splits are a KshotError unless `allow_leaks`.
    """
    if not _NAME.fullmatch(name):
        raise KshotError(f"{name!r} cannot name a data set: use letters, digits, '-', '_' and '.', such as my-photos")
    importer = _importer(source)
    request = Request(_archives(source, from_dir), root / ".downloads", split, seed)
    full_rule = _changed(importer.rule, rule or {})
    if split and importer.splits and split not in importer.splits:
        raise KshotError(f"{source} has no split {split!r}; it has: {', '.join(importer.splits)}")
    fractions = FRACTIONS if importer.splits or not split else _fractions(split)
    with _locked(root, name) as waiting:
        yield from waiting
        if (root / name).exists() and not replace:
            raise KshotError(f"{root / name} exists already. Choose another name, or replace it: --replace")
        with _workplace(root, name) as place, importer.open(request) as listing:
            packing = _Packing(place, full_rule)
            yield from packing.pack(grouped(listing.pictures, group_by) if group_by else listing.pictures, min_images)
            if split and not importer.splits and all(known for _, known, _, _ in packing.classes):
                raise KshotError(f"{source} is split already into train/, val/ and test/: leave --split out")
            classes = _split_by_class(packing.classes, fractions, seed)
            index = Index(
                name=name,
                source=source if importer.provenance else Path(source).name,
                provenance=importer.provenance or "a user's own images",
                licence=importer.licence,
                rule=full_rule,
                images_sha256=file_sha256(place / IMAGES),
                classes=tuple(classes),
                files=tuple(packing.files),
                skipped=tuple(sorted(listing.skipped + packing.skipped, key=lambda s: s.name)),
                duplicates=tuple(_duplicates(packing.files)),
            )
            if not allow_leaks:
                _refuse_leaks(index)
            (place / INDEX).write_bytes(index.to_bytes())
            contact_sheet(ImageSet.open(place)).save(place / SHEET)
            atomic.replace(root / name, place)
    yield _report(root / name, index)


def finish(events: Iterable[Progress | ImportReport]) -> ImportReport:
    """Run an import to its end and return the report."""
    *_, report = events
    assert isinstance(report, ImportReport)
    return report


# ---- sources


def _importer(source: str) -> Importer:
    from kshot import plugins  # imported here, since folders and zips need no plugins

    if os.sep in source or source.startswith(".") or source.lower().endswith(".zip"):
        return _own_images(Path(source))
    found = plugins.find()
    named = [p.name for p in found.of("datasets")]
    if source not in named and Path(source).exists():
        return _own_images(Path(source))
    try:
        return found.dataset(source).value
    except KshotError as error:
        raise KshotError(f"there is no folder or zip {source!r} here, and {error}") from None


def _own_images(path: Path) -> Importer:
    """A user's folder or zip."""
    return Importer(
        about="a folder or zip with one folder per class, or with train/, val/ and test/ of such folders",
        licence="as the images' owner says",
        provenance="",
        rule=ImageRule(size=84),
        open=lambda request: list_images([path]),
    )


def _archives(source: str, from_dir: Path | None) -> Path | None:
    if from_dir is not None:
        if not from_dir.is_dir():
            raise KshotError(f"--from {from_dir} is not a folder; give the folder that holds the archives of {source}")
        return from_dir
    mirror = os.environ.get("KSHOT_MIRROR")
    folder = Path(mirror, source) if mirror else None
    return folder if folder and folder.is_dir() else None


# ---- packing


class _Packing:
    """Writes images.npy class by class, with plain writes, which fail on a full disk where a memory map would crash."""

    def __init__(self, place: Path, rule: ImageRule) -> None:
        self.place = place
        self.rule = rule
        self.files: list[FileEntry] = []
        self.skipped: list[Skipped] = []
        self.classes: list[tuple[str, Split | None, int, int]] = []  # name, split, start, count

    def pack(self, pictures: Sequence[Picture], min_images: int) -> Iterator[Progress]:
        pictures = sorted(pictures, key=lambda p: (p.label, p.name))
        _refuse_classes_in_two_splits(pictures)
        done, start = 0, 0
        with (self.place / IMAGES).open("wb") as output:
            self._write_header(output, 0)
            for label, group in groupby(pictures, key=lambda p: p.label):
                arrays, files = [], []
                for picture in group:
                    if pair := self._take(picture):
                        arrays.append(pair[0])
                        files.append(pair[1])
                    done += 1
                    if done % 100 == 0:
                        yield Progress(done, len(pictures), label)
                if 0 < len(files) < min_images:
                    why = f"its class {label!r} has too few usable images: {len(files)} of at least {min_images}"
                    self.skipped += [Skipped(name=file.name, why=why) for file in files]
                elif files:
                    output.write(np.stack(arrays).tobytes())  # (count, C, H, W)
                    self.files += files
                    self.classes.append((label, picture.split, start, len(files)))
                    start += len(files)
            self._write_header(output, start)
        yield Progress(len(pictures), len(pictures), "packed")
        if not self.files:
            raise KshotError(_nothing_usable(self.skipped))

    def _take(self, picture: Picture) -> tuple[np.ndarray, FileEntry] | None:
        try:
            content = picture.read()
            if isinstance(content, Image.Image):
                array, digest = render(content, self.rule), hashlib.sha256(content.tobytes())
            else:
                array, digest = decode(content, self.rule), hashlib.sha256(content)
        except ImageError as error:
            self.skipped.append(Skipped(name=picture.name, why=str(error)))
        except OSError as error:
            self.skipped.append(Skipped(name=picture.name, why=f"cannot be read: {error.strerror}"))
        else:
            return array, FileEntry(name=picture.name, sha256=digest.hexdigest(), group=picture.group)
        return None

    def _write_header(self, output: Any, count: int) -> None:
        """Write the header; its length does not depend on the count, since numpy reserves space for the first axis."""
        output.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *self.rule.shape)}
        np.lib.format.write_array_header_1_0(output, header)


def _refuse_classes_in_two_splits(pictures: Iterable[Picture]) -> None:
    splits = defaultdict(set)
    for picture in pictures:
        splits[picture.label].add(picture.split)
    for label, where in splits.items():
        if len(where) > 1:
            raise KshotError(
                f"class {label!r} is in {' and in '.join(sorted(map(str, where)))}. Splits are by class: test classes "
                "must be new. Move each class to one split, or import without train/, val/ and test/ folders."
            )


def _nothing_usable(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return "there are no files. Put the images of each class in a separate folder: cats/1.jpg, dogs/1.jpg, ..."
    examples = "".join(f"\n  {s.name}: {s.why}" for s in skipped[:5])
    return f"not one of {len(skipped)} files can be used:{examples}"


def _split_by_class(
    classes: Sequence[tuple[str, Split | None, int, int]], fractions: Sequence[float], seed: int
) -> list[ClassEntry]:
    splits: dict[str, Split] = {name: split for name, split, _, _ in classes if split}
    free = [name for name, split, _, _ in classes if not split]  # sorted, so the same on every file system
    if free:
        splits |= random_split(free, fractions, seed)
    return [ClassEntry(name=name, split=splits[name], start=start, count=count) for name, _, start, count in classes]


def _fractions(text: str) -> tuple[float, ...]:
    try:
        fractions = tuple(float(part) for part in text.split("/"))
    except ValueError:
        fractions = ()
    if len(fractions) != 3 or min(fractions) < 0 or not 0 < sum(fractions) < float("inf"):
        raise KshotError(
            f"--split {text!r}: give the fractions of classes in train/val/test, such as 0.6/0.2/0.2 or 0/0/1"
        )
    return fractions


def _changed(rule: ImageRule, changes: Mapping[str, Any]) -> ImageRule:
    try:
        return ImageRule.model_validate(rule.model_dump() | dict(changes))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise KshotError(f"{'.'.join(map(str, problem['loc']))} = {problem['input']!r}: {problem['msg']}") from None


def _duplicates(files: Iterable[FileEntry]) -> list[tuple[str, ...]]:
    by_content = defaultdict(list)
    for file in files:
        by_content[file.sha256].append(file.name)
    return sorted(tuple(sorted(names)) for names in by_content.values() if len(names) > 1)


def _leaks(index: Index) -> dict[tuple[str, ...], dict[Split, str]]:
    """Identical files in more than one split, and one of the files for each of these splits."""
    split_of = {f.name: c.split for c in index.classes for f in index.files[c.start : c.start + c.count]}
    by_split = {names: {split_of[name]: name for name in reversed(names)} for names in index.duplicates}
    return {names: files for names, files in by_split.items() if len(files) > 1}


def _refuse_leaks(index: Index) -> None:
    if leaks := _leaks(index):
        pairs = [" = ".join(f"{file} ({split})" for split, file in sorted(files.items())) for files in leaks.values()]
        raise KshotError(
            f"{len(leaks)} images are in more than one split, so test images would be training images:"
            + "".join(f"\n  {pair}" for pair in pairs[:5])
            + "\nKeep one file of each, or import them anyway: --allow-leaks"
        )


def _report(folder: Path, index: Index) -> ImportReport:
    data_set = ImageSet.open(folder)
    return ImportReport(
        folder=folder,
        version=data_set.version,
        images=len(index.files),
        splits=data_set.splits,
        skipped=index.skipped,
        duplicates=index.duplicates,
        leaks=list(_leaks(index)),
        groups={
            c.name: len({f.group for f in index.files[c.start : c.start + c.count]})
            for c in index.classes
            if index.files[c.start].group is not None
        },
    )


# ---- all or nothing


@contextmanager
def _locked(root: Path, name: str) -> Iterator[Iterator[Progress]]:
    """Lock a name against other imports; yields an iterator that waits for the lock and reports it."""
    (root / ".locks").mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".locks" / name)

    def wait() -> Iterator[Progress]:
        while not lock.is_locked:
            try:
                lock.acquire(timeout=1)
            except Timeout:
                yield Progress(0, 0, f"waiting for another import of {name}")

    try:
        yield wait()
    finally:
        lock.release()


@contextmanager
def _workplace(root: Path, name: str) -> Iterator[Path]:
    """A temporary folder beside the data set, deleted at the end, together with those of killed imports."""
    for stale in root.glob(f".importing-{name}~*"):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".importing-{name}~", dir=root) as place:
            folder = Path(place, name)
            folder.mkdir()
            yield folder
    except OSError as error:
        raise KshotError(
            f"{root / name} was not written: {error.strerror or error}. Nothing of it was kept."
        ) from error
