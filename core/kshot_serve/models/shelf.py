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
from kshot_serve.models.registry import RegisteredVersion, Registry

_LAST = "last.json"  # what is on the shelf: the last good bundle
_INCOMING = ".incoming-"


class Shelf:
    """The bundles on this disk, each in a folder named by the hash of its bundle.json."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, registry: Registry, version: RegisteredVersion, *, unpinned: bool = False) -> Path:
        """The bundle of a version: from here, or else from the registry. Its folder appears only when complete.

        A version without the hash of its bundle.json is refused, unless `unpinned`.
        """
        if not version.sha256 and not unpinned:
            raise BundleError(
                f"{version} has no tag sha256.{MANIFEST}, so that nothing says which files were meant: register it "
                "with `kshot`, or serve with --unpinned"
            )
        if version.sha256 and _is_sound(here := self._folder / version.sha256[:16], version.sha256):
            return here
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=_incoming()) as scratch:
            came = Path(scratch) / "bundle"
            registry.download(version, came)
            read(came)  # checks every file
            sha256 = hashlib.sha256((came / MANIFEST).read_bytes()).hexdigest()
            folder = self._folder / sha256[:16]
            try:
                os.rename(came, folder)
            except OSError:  # there is one: another worker was faster, or it is damaged
                if not _is_sound(folder, sha256):
                    shutil.rmtree(folder, ignore_errors=True)
                    os.rename(came, folder)
        return folder

    def last(self) -> tuple[RegisteredVersion, Path] | None:
        """The last good bundle, if one is here."""
        try:
            kept = json.loads((self._folder / _LAST).read_text())
            version, folder = RegisteredVersion(**kept["version"]), self._folder / kept["folder"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (version, folder) if folder.is_dir() else None

    def keep(self, version: RegisteredVersion, folder: Path) -> None:
        """Remember the last good bundle. It and the one before stay; others go."""
        before = self.last()
        if before == (version, folder):
            return  # another worker has kept it, and knows the one before
        fresh = self._folder / f"{_incoming()}{_LAST}"
        fresh.write_text(json.dumps({"version": asdict(version), "folder": folder.name}))
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


def _is_sound(folder: Path, sha256: str) -> bool:
    """Whether a bundle is here, whole, and its manifest has this hash."""
    try:
        read(folder)
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() == sha256
    except (BundleError, OSError):
        return False
