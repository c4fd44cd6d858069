"""Classes in a folder or a zip, a sub-folder each, in batches that a label space takes; what it has is left out."""

from __future__ import annotations

import hashlib
import unicodedata
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath

from kshot_client.errors import ClientError

_BATCH_BYTES = 8_000_000  # of photos in one request, about
_LARGEST = 100_000_000  # bytes of one file; servers take less

Batch = dict[str, bytes]
"""Encoded photos, by what their files are called."""


def normal(name: str) -> str:
    """The name in its normal form, as servers keep it, without blanks around it."""
    return unicodedata.normalize("NFC", name).strip()


class Filling:
    """A label space to be made or updated from a folder or zip, and what came of it so far."""

    def __init__(self, source: str | Path) -> None:
        self._source = Path(source)
        self.name = normal(self._source.stem if self._source.is_file() else self._source.resolve().name)
        self._classes: dict[str, list[str]] = {}  # each one's files
        with self._opened() as (files, _):
            split = [PurePosixPath(file).parts for file in files]
            while split and len({parts[0] for parts in split}) == 1 and all(len(parts) > 2 for parts in split):
                split = [parts[1:] for parts in split]  # one folder around the classes' folders
            for file, (first, *rest) in zip(files, split, strict=True):
                if rest:
                    self._classes.setdefault(normal(first), []).append(file)
        if not self._classes:
            raise ClientError(f"{source} has no folders with photos in them: give each class a folder named after it")
        self.added = self.there = 0
        self.skipped: list[str] = []  # a line each, for people

    def __str__(self) -> str:
        counts = f"classes {len(self._classes)}, photos added {self.added}, there already {self.there}"
        return f"{self.name}: {counts}, notes {len(self.skipped)}"

    def batches(
        self, known: Mapping[str, Collection[str]], *, ways: int, shots: int, support: int, photos: int
    ) -> Iterator[tuple[str, Batch]]:
        """Batches of at most so many `photos` of one class each; the caller counts what was `added` or `skipped`.

        `known` are the sha256 of the photos of each class that there is. A model adapts to so many classes, photos of
        each, and photos in all: of each class's files the first count, the same ones whenever it is done again.
        """
        if (count := len({*known, *self._classes})) > ways:
            raise ClientError(f"{self.name} would have {count} classes, and this model tells at most {ways} apart")
        most = max(1, min(shots, support // count))
        if cut := [name for name, files in self._classes.items() if len(files) > most]:
            self.skipped.append(
                f"of {', '.join(cut)} the first {most} photos count; this model learns from at most {shots} of a class "
                f"and {support} in all"
            )
        with self._opened() as (_, read):
            for name, files in self._classes.items():
                there, batch = set(known.get(name, ())), Batch()
                for file in islice(files, most):
                    content = read(file)
                    if (sha256 := hashlib.sha256(content).hexdigest()) in there:
                        self.there += 1
                        continue
                    if len(there) >= shots:
                        self.skipped.append(f"{file}: the class has {shots} photos, and the model takes no more")
                        continue
                    there.add(sha256)
                    batch[file] = content
                    if len(batch) == photos or sum(map(len, batch.values())) > _BATCH_BYTES:
                        yield name, batch
                        batch = Batch()
                if batch:
                    yield name, batch

    @contextmanager
    def _opened(self) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
        """The files, sorted, without hidden ones, and what reads one."""
        source = self._source
        if source.is_dir():
            paths = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
            yield _shown(paths), lambda file: (source / file).read_bytes()
            return
        try:
            archive = zipfile.ZipFile(source)
        except (OSError, zipfile.BadZipFile) as error:
            raise ClientError(f"{source} is neither a folder nor a zip of class folders: {error}") from None
        with archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist() if not entry.is_dir()}
            yield _shown(sizes), lambda file: archive.read(file) if sizes[file] <= _LARGEST else b""


def _shown(files: Collection[str]) -> list[str]:
    return sorted(file for file in files if not any(part.startswith((".", "__MACOSX")) for part in file.split("/")))
