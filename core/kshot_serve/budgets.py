"""What requests may take at once."""

from __future__ import annotations

from kshot_serve.errors import Problem


class Bodies:
    """The bytes that the bodies of all requests under way may take."""

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, size: int) -> None:
        if size > self._left:
            raise Problem("busy", "too many large requests at once: try again", retry_after=1, reason="bodies")
        self._left -= size

    def give(self, size: int) -> None:
        self._left += size
