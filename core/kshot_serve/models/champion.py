"""The bundle that serves, with the name and version that it was registered under."""

from __future__ import annotations

from dataclasses import dataclass

from kshot_runtime.bundle import Bundle


@dataclass(frozen=True, eq=False)
class Champion:
    """A bundle at work, with the name and version that it goes by."""

    bundle: Bundle
    id: str  # the bundle's, which names exactly its graphs
    name: str
    version: str
    source: str
