"""A label space as one zip: manifest.json with names and order, and photos/ as they came. Nothing in it is trusted."""

from __future__ import annotations

import io
import json
import re
import stat
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import Limits
from kshot_serve.errors import Problem
from kshot_serve.settings import Accept
from kshot_serve.spaces.contents import check_counts
from kshot_serve.storage.values import Snapshot, digest

_MANIFEST, _MANIFEST_BYTES = "manifest.json", 4_000_000
_FILE = r"photos/[0-9]{1,9}\.(jpg|png|webp)"
_IN_MEMORY = 16_000_000
_TYPES = {b"\xff\xd8\xff": ("image/jpeg", "jpg"), b"\x89PNG": ("image/png", "png"), b"RIFF": ("image/webp", "webp")}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Model(_Part):
    """What served when the label space was exported; for people, and for comparing."""

    name: str
    version: str
    bundle: str
    image: ImageRule


class PackedPhoto(_Part):
    file: Annotated[str, Field(pattern=f"^{_FILE}$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="of this file")]


class PackedClass(_Part):
    name: str
    photos: tuple[PackedPhoto, ...]


class Manifest(_Part):
    """manifest.json. Classes and photos are in the order of the label space."""

    schema_version: Literal[1] = 1
    kind: Literal["kshot label space"] = "kshot label space"
    name: str
    accept: Accept | None = None
    classes: tuple[PackedClass, ...]
    model: Model


@dataclass(frozen=True)
class Most:
    """What an archive may hold: bytes of one photo, bytes of all, classes and photos."""

    photo: int
    bytes: int
    limits: Limits


def pack(snapshot: Snapshot, photo: Callable[[str], bytes | None], model: Model) -> IO[bytes]:
    """The zip of a label space, in a temporary file at its start. `photo` gives a file, or none if it is gone."""
    file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115  (the caller closes it)
    number, classes = 0, []
    with zipfile.ZipFile(file, "w") as archive:
        for each in snapshot.classes:
            photos = []
            for there in each.photos:
                if (content := photo(there.id)) is None:
                    continue
                number += 1
                name = f"photos/{number:04}.{_type(content)[1]}"
                archive.writestr(name, content)  # photos are compressed as they are
                photos.append(PackedPhoto(file=name, sha256=digest(content)))
            classes.append(PackedClass(name=each.name, photos=tuple(photos)))
        manifest = Manifest(name=snapshot.name, accept=snapshot.accept, classes=tuple(classes), model=model)
        archive.writestr(_MANIFEST, manifest.model_dump_json(indent=2), zipfile.ZIP_DEFLATED)
    file.seek(0)
    return file


def unpack(content: bytes, most: Most) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and the photos by their files, after checking that they are what the manifest says.

    Sizes are checked before anything is read, and no more is read than they say. Nothing is written anywhere.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise _refused("a file is in it twice")
            _check(entries, most)
            manifest = _manifest(archive.read(_MANIFEST))
            check_counts(most.limits, [len(each.photos) for each in manifest.classes])
            listed = {photo.file: photo.sha256 for each in manifest.classes for photo in each.photos}
            if len(listed) != sum(len(each.photos) for each in manifest.classes):
                raise _refused(f"its {_MANIFEST} lists a photo twice")
            if set(listed) != set(entries) - {_MANIFEST}:
                raise _refused(f"its photos are not those that its {_MANIFEST} lists")
            photos = {file: archive.read(file) for file in listed}
    except Problem:
        raise
    except Exception:  # zipfile raises many kinds on damaged files: its own, zlib's, struct's, EOFError, ...
        raise _refused("it cannot be read as a zip to its end") from None
    for file, sha256 in listed.items():
        if digest(photos[file]) != sha256:
            raise _refused(f"{file} is not the file that its {_MANIFEST} describes")
    return manifest, photos


def media_type(photo: bytes) -> str:
    return _type(photo)[0]


def _type(photo: bytes) -> tuple[str, str]:
    return next(kind for start, kind in _TYPES.items() if photo.startswith(start))


def _check(entries: dict[str, zipfile.ZipInfo], most: Most) -> None:
    if _MANIFEST not in entries:
        raise _refused(f"it lacks {_MANIFEST}")
    if len(entries) - 1 > most.limits.support:
        raise Problem(
            "too_many_photos", f"the archive has {len(entries) - 1} photos; at most {most.limits.support} are taken"
        )
    for name, entry in entries.items():
        if name != _MANIFEST and not re.fullmatch(_FILE, name):
            raise _refused("it has a file that is neither its manifest nor a photo")
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            raise _refused("it has a link or something else that is no file")
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refused("it is encrypted, or compressed in a way that is not taken")
        if entry.file_size > (_MANIFEST_BYTES if name == _MANIFEST else most.photo):
            raise Problem("photo_too_large", "a file in the archive is larger than photos may be")
    if sum(entry.file_size for entry in entries.values()) > most.bytes:
        raise Problem("body_too_large", f"the archive holds more than {most.bytes:,} bytes, the most of a label space")


def _manifest(content: bytes) -> Manifest:
    try:
        return Manifest.model_validate(json.loads(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise _refused(f"its {_MANIFEST} is not valid: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise _refused(f"its {_MANIFEST} is no JSON") from None


def _refused(why: str) -> Problem:
    return Problem("bad_request", f"this is no label space that was exported: {why}")
