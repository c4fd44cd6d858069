"""What writes to label spaces take and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kshot_serve.errors import Problem
from kshot_serve.storage.values import Class, Snapshot


class Keep:
    """Leave it as it is: `None` already means the server's own."""


KEEP: Final = Keep()


@dataclass(frozen=True)
class Written:
    """What a write did."""

    revision: int
    class_: Class | None = None  # that it was about, as it is now
    photos: tuple[str, ...] = ()  # ids of those that are new
    notes: tuple[str, ...] = ()  # what may be wrong with what came, for people
    gone: tuple[str, ...] = ()  # ids that a rollback could not bring back
    scrubbed: bool | None = None  # of a deletion: whether the bytes are gone from the disk; none: not known


def class_of(there: Snapshot, class_id: str) -> Class:
    for each in there.classes:
        if each.id == class_id:
            return each
    raise Problem("class_unknown", "this label space has no such class")
