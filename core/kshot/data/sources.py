"""Data sources: the interface of importers, and readers of folders and zips.

A zip is never unpacked: its members are read one at a time. A malicious archive is refused.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from kshot.data.datasets import Skipped
from kshot_runtime.errors import KshotError
from kshot_runtime.images import LIMITS, ImageError, ImageRule

Split = Literal["train", "val", "test"]
_SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
}  # fmt: skip
_MAX_RATIO = 200  # of unpacked to packed size; images hardly compress, so a larger ratio is a zip bomb
_MAX_MEMBERS = 5_000_000


class Picture(NamedTuple):
    """An image that is not decoded yet."""

    name: str  # unique in the source
    label: str  # its class
    split: Split | None  # None: assigned by random_split
    read: Callable[[], bytes | Image.Image]  # an encoded file, or pixels that need no decoding
    group: str | None = None  # pictures that belong together: a visit, a camera, a patient


@dataclass
class Listing:
    """The contents of a source: its images, not read yet, and the files skipped."""

    pictures: list[Picture]
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """The options of an import that a source may need."""

    folder: Path | None  # of its archives, if the user or the mirror has them
    cache: Path  # for downloads
    split: str | None  # one of the source's splits
    seed: int


@dataclass(frozen=True)
class Importer:
    """A source of images, as a plugin provides it through `kshot_datasets`."""

    about: str  # one line for the user
    licence: str
    provenance: str
    rule: ImageRule  # how its images are packed unless the user says otherwise
    open: Callable[[Request], AbstractContextManager[Listing]]  # archives stay open inside the context
    splits: Mapping[str, str] = field(default_factory=dict)  # names with descriptions; the first is the default
    embedded: bool = False  # needs neither files nor network


def random_split(names: Sequence[str], fractions: Sequence[float], seed: int) -> dict[str, Split]:
    """The split of each name: fractions of a seeded shuffle, at least one name in each split with a fraction over 0."""
    order: tuple[Split, ...] = ("train", "val", "test")
    needed = sum(f > 0 for f in fractions)
    if len(names) < needed:
        has = f"only one class ({names[0]!r})" if len(names) == 1 else f"only {len(names)} classes"
        raise KshotError(
            f"there {'is' if len(names) == 1 else 'are'} {has}, and train, val and test need one each at least. "
            "Add folders of other classes, or put all in one split: --split 0/0/1"
        )
    exact = [f * len(names) / sum(fractions) for f in fractions]
    counts = [max(int(share), 1) if share else 0 for share in exact]
    while sum(counts) > len(names):
        counts[int(np.argmax(counts))] -= 1
    while sum(counts) < len(names):  # the split that rounding reduced most gets the remainder
        counts[int(np.argmax(np.array(exact) - counts))] += 1
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    chosen = [split for split, count in zip(order, counts, strict=True) for _ in range(count)]
    return dict(zip(shuffled, chosen, strict=True))


def grouped(pictures: Sequence[Picture], group_by: str) -> list[Picture]:
    """The images with their groups, taken from the last folder (then not part of the class name) or the file name.

    `group_by` is `folder`, or a glob of file names with the group in braces, such as `{visit}_*`; of several possible
    matches the shortest group counts. A KshotError if a picture has no group.
    """
    named = re.fullmatch(r"([^{}]*)\{\w*\}([^{}]*)", group_by)
    if group_by == "folder":
        found = [picture.label.rpartition("/")[::2] for picture in pictures]  # class and group
    elif named:
        before, after = (re.escape(part).replace(r"\*", ".*?").replace(r"\?", ".") for part in named.groups())
        matches = [re.fullmatch(f"{before}(.+?){after}", PurePosixPath(picture.name).name) for picture in pictures]
        found = [(picture.label, match[1] if match else "") for picture, match in zip(pictures, matches, strict=True)]
    else:
        raise KshotError(
            f"--group-by {group_by!r}: write folder, where each group is a folder in that of its class "
            "(cats/visit1/a.jpg), or a pattern of file names with the group in braces, such as {visit}_*"
        )
    if without := [picture.name for picture, pair in zip(pictures, found, strict=True) if not all(pair)]:
        where = "not in a group's folder inside a class's folder" if group_by == "folder" else "not matched"
        raise KshotError(
            f"--group-by {group_by!r}: {len(without)} of {len(pictures)} pictures are {where}, such as "
            f"{', '.join(without[:5])}. Every picture needs a group: write a pattern that fits all, or move these."
        )
    return [picture._replace(label=label, group=group) for picture, (label, group) in zip(pictures, found, strict=True)]


@contextmanager
def list_images(paths: Sequence[Path]) -> Iterator[Listing]:
    """The pictures of folders and zips with one folder per class, optionally under train/, val/ and test/."""
    with ExitStack() as stack:
        files: dict[str, Callable[[], bytes]] = {}
        skipped: list[Skipped] = []
        for path in paths:
            if path.is_dir():
                found = _folder_files(path, skipped)
            elif path.is_file():
                found = _zip_files(path, stack, skipped)
            else:
                raise KshotError(f"there is no folder or zip {path}")
            if again := files.keys() & found.keys():
                raise KshotError(f"{min(again)} is in {path.name} and in a folder or zip read before it")
            files |= found
        yield _listing(files, skipped)


def _listing(files: Mapping[str, Callable[[], bytes]], skipped: list[Skipped]) -> Listing:
    """Assign files to classes and splits by their folders."""
    paths = {name: PurePosixPath(name).parts for name in sorted(files)}
    wrapped = {parts[0] for parts in paths.values()}
    depth = 0  # 1 if a single folder contains everything, as in many archives: it is not a class
    if len(wrapped) == 1 and min(wrapped).lower() not in _SPLIT_FOLDERS and all(len(p) > 2 for p in paths.values()):
        depth = 1
    images = {name: parts[depth:] for name, parts in paths.items() if len(parts) > depth + 1}
    tops = {parts[0].lower() for parts in images.values()}
    split_already = tops <= _SPLIT_FOLDERS.keys() and all(len(parts) > 2 for parts in images.values())
    skipped += [Skipped(name=name, why="not in the folder of a class") for name in paths if name not in images]
    pictures = [
        Picture(name, "/".join(parts[1:-1]), _SPLIT_FOLDERS[parts[0].lower()], files[name])
        if split_already
        else Picture(name, "/".join(parts[:-1]), None, files[name])
        for name, parts in images.items()
    ]
    return Listing(pictures, skipped)


def _folder_files(folder: Path, skipped: list[Skipped]) -> dict[str, Callable[[], bytes]]:
    def refuse(error: OSError) -> None:
        raise KshotError(f"cannot read {error.filename}: {error.strerror}. Check its permissions.") from None

    files = {}
    for parent, folders, names in os.walk(folder, onerror=refuse):
        relative = Path(parent).relative_to(folder)
        for name in [*folders]:
            if _is_system_file(name) or Path(parent, name).is_symlink():
                folders.remove(name)
                skipped.append(Skipped(name=f"{(relative / name).as_posix()}/", why=_why_skipped(name)))
        for name in names:
            if _is_system_file(name):
                skipped.append(Skipped(name=(relative / name).as_posix(), why=_why_skipped(name)))
            else:
                files[(relative / name).as_posix()] = _limited_reader(Path(parent, name))
    return files


def _limited_reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        if not path.is_file():  # reading a pipe or a device would not end
            raise ImageError("not a regular file")
        with path.open("rb") as file:
            return file.read(LIMITS.max_bytes + 1)

    return read


def _zip_files(path: Path, stack: ExitStack, skipped: list[Skipped]) -> dict[str, Callable[[], bytes]]:
    """The files in a zip. A KshotError if it is damaged, encrypted or malicious."""
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except (zipfile.BadZipFile, NotImplementedError):
        raise KshotError(f"{path} is not a zip, or it is damaged") from None
    except OSError as error:
        raise KshotError(f"cannot read {path}: {error.strerror}") from None
    members = [m for m in archive.infolist() if not m.is_dir()]
    if len(members) > _MAX_MEMBERS:
        raise KshotError(f"{path} has {len(members):,} files; at most {_MAX_MEMBERS:,} are taken")
    packed, unpacked = path.stat().st_size, sum(m.file_size for m in members)
    if unpacked > _MAX_RATIO * max(packed, 4096):
        raise KshotError(f"{path} unpacks from {packed:,} to {unpacked:,} bytes; no archive of images does. Refused.")
    files: dict[str, Callable[[], bytes]] = {}
    for member in members:
        parts = PurePosixPath(member.filename).parts
        if not parts or ".." in parts or member.filename.startswith("/") or "\\" in member.filename or ":" in parts[0]:
            raise KshotError(f"{path} holds {member.filename!r}, a path out of the archive. Refused.")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise KshotError(f"{path} holds {member.filename!r}, a symbolic link. Refused.")
        if member.flag_bits & 1:
            raise KshotError(f"{path} is encrypted. Unpack it, and import the folder.")
        if member.filename in files:
            raise KshotError(f"{path} holds {member.filename!r} twice. Refused.")
        if system_file := next(filter(_is_system_file, parts), None):
            skipped.append(Skipped(name=member.filename, why=_why_skipped(system_file)))
        else:
            files[str(PurePosixPath(*parts))] = _member_reader(archive, member)
    return files


def _member_reader(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            with archive.open(member) as file:
                return file.read(LIMITS.max_bytes + 1)
        except Exception:  # zipfile, zlib and lzma raise different errors
            raise ImageError("damaged in the zip") from None

    return read


def _is_system_file(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _why_skipped(name: str) -> str:
    return (
        "a file of the operating system, or hidden"
        if _is_system_file(name)
        else "a link to a folder; links are not followed"
    )
