"""Admission: a request is refused at once if the queue or the estimated wait is too long."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kshot_serve.inference.engine import Engine

_MEMORY = 0.99  # of the measured rate: the last hundred images count


class Admission:
    """Places in the engine's queue; a context manager that holds them."""

    def __init__(self, engine: Engine, images: int) -> None:
        self._engine = engine
        self._images = images

    def __enter__(self) -> None:
        if not self._engine._places:
            self._engine._rate.resume()
        self._engine._places += self._images
        self._engine._requests += 1

    def __exit__(self, *error: object) -> None:
        self._engine._places -= self._images
        self._engine._requests -= 1
        self._engine._crowded()
        self._engine._rate.add(self._images)
        self._engine._leave()


class Rate:
    """Images a second that leave while there are any, as the last ones have shown."""

    def __init__(self) -> None:
        self._images, self._seconds, self._last = 1.0, 0.001, monotonic()

    @property
    def per_second(self) -> float:
        return self._images / self._seconds

    def resume(self) -> None:
        """There is work again; the pause does not count."""
        self._last = monotonic()

    def add(self, images: int) -> None:
        """So many have left."""
        now = monotonic()
        kept = _MEMORY**images
        self._images = kept * self._images + images
        self._seconds = kept * self._seconds + max(1e-6, now - self._last)
        self._last = now
