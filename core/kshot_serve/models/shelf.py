"""Bundles on this disk: the last good ones of a model, for when the registry is away."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from kshot_runtime.manifest import MANIFEST, BundleError, read
from kshot_serve.models.registry import Found, Registry

_LAST = "last.json"  # what is on the shelf: the last good bundle
_INCOMING = ".incoming-"


class Shelf:
    """The bundles on this disk, each in a folder named by the hash of its bundle.json."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, registry: Registry, found: Found) -> Path:
        """The bundle of a version: from here, or else from the registry. Its folder appears only when complete."""
        if found.sha256 and _hash(here := self._folder / found.sha256[:16]) == found.sha256 and _sound(here):
            return here
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=_incoming()) as scratch:
            came = registry.download(found, Path(scratch))
            sha256 = _hash(came)
            if sha256 is None or sha256 != (found.sha256 or sha256):
                raise BundleError(
                    f"version {found.version} of {found.name} is not what was registered: its {MANIFEST} is missing or "
                    "changed. Restore it, or register the bundle anew."
                )
            read(came)  # checks every file
            folder = self._folder / sha256[:16]
            try:
                os.rename(came, folder)
            except OSError:  # there is one: another worker was faster, or it is damaged
                if _hash(folder) != sha256 or not _sound(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                    os.rename(came, folder)
        return folder

    def last(self, name: str) -> tuple[Found, Path] | None:
        """The last good bundle of a model, if one is here."""
        try:
            kept = json.loads((self._folder / _LAST).read_text())
            found, folder = Found(**kept["found"]), self._folder / kept["folder"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (found, folder) if found.name == name and folder.is_dir() else None

    def keep(self, found: Found, folder: Path) -> None:
        """Remember the last good bundle. It and the one before stay; others go."""
        before = self.last(found.name)
        if before == (found, folder):
            return  # another worker has kept it, and knows the one before
        fresh = self._folder / f"{_incoming()}{_LAST}"
        fresh.write_text(json.dumps({"found": asdict(found), "folder": folder.name}))
        os.replace(fresh, self._folder / _LAST)
        self._clear({folder, before[1]} if before else {folder})

    def tidy(self) -> None:
        """Remove what a killed process had begun to fetch or to write; others that live may be at it."""
        for left in self._folder.glob(f"{_INCOMING}*"):
            if _is_at_work(left.name):
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def _clear(self, keep: set[Path]) -> None:
        for folder in self._folder.iterdir():
            if folder.is_dir() and folder not in keep and not folder.name.startswith(_INCOMING):
                shutil.rmtree(folder, ignore_errors=True)


def _incoming() -> str:
    """How the names of what this process makes begin, until it is complete."""
    return f"{_INCOMING}{os.getpid()}-"


def _is_at_work(name: str) -> bool:
    """Whether the process that made this lives, and is another: a container's has the number of the one before it."""
    made_by = re.match(rf"{re.escape(_INCOMING)}(\d{{1,9}})-", name)
    if made_by is None or int(made_by[1]) == os.getpid():
        return False
    try:
        os.kill(int(made_by[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def _hash(folder: Path) -> str | None:
    """sha256 of a bundle's manifest."""
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def _sound(folder: Path) -> bool:
    try:
        read(folder)
    except BundleError:
        return False
    return True
