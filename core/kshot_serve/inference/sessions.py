"""onnxruntime sessions with a label space's weights as constants, least recently used first out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

from kshot_runtime.bundle import Classifier, Graphs, Tensors

_SESSION = 1_000_000  # bytes at least of a session for one state


class Sessions:
    """Sessions with a state's weights as constants, the least used of which go when there is no more room."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._held: OrderedDict[Hashable, tuple[Classifier, int]] = OrderedDict()
        self._used = 0

    def classify(self, key: Hashable, graphs: Graphs, state: Tensors, query: np.ndarray) -> Tensors:
        """What `graphs` give of a query; in a thread."""
        with self._lock:
            if key not in self._held:
                size = max(_SESSION, 2 * sum(tensor.nbytes for tensor in state.values()))
                if size > self._room:
                    return graphs.classify(state, query)
                self._held[key] = graphs.baked(state), size
                self._used += size
                while self._used > self._room:
                    self._drop(next(iter(self._held)))
            self._held.move_to_end(key)
            classifier, _ = self._held[key]
        return classifier(query)

    def forget(self, key: Hashable) -> None:
        with self._lock:
            if key in self._held:
                self._drop(key)

    def _drop(self, key: Hashable) -> None:
        self._used -= self._held.pop(key)[1]
