"""Photos on their way to a server: read, divided over requests, as parts of a multipart body."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

Photo = bytes | str | Path
"""An encoded photo, or the path of one."""

_PART_BYTES = 1000  # of a multipart body around one photo, at most


def read(photo: Photo) -> bytes:
    return photo if isinstance(photo, bytes) else Path(photo).read_bytes()


def parts(field: str, photos: Sequence[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    """Encoded photos as `files` of an httpx request."""
    return [(field, ("photo", photo)) for photo in photos]


def batches(photos: Sequence[Photo], most: int, most_bytes: int) -> Iterator[list[bytes]]:
    """Encoded photos in lists for one request each; one too large for any request is in a list by itself."""
    batch, size = list[bytes](), 0
    for photo in photos:
        content = read(photo)
        size += len(content) + _PART_BYTES
        if batch and (len(batch) == most or size > most_bytes):
            yield batch
            batch, size = [], len(content) + _PART_BYTES
        batch.append(content)
    yield batch
