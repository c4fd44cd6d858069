"""An engine in an event loop; models, images, and a gate before a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kshot_runtime.bundle import Bundle, Graphs
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champion import Champion
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import EngineSettings


class Gate:
    """The real graphs, with a door before each run, and a list of what has gone through."""

    def __init__(self, graphs: Graphs, monkeypatch: pytest.MonkeyPatch, door: str = "embed") -> None:
        self.open = threading.Event()
        self.runs: list[np.ndarray] = []
        self._arrived = threading.Semaphore(0)
        real = getattr(graphs, door)

        def through(*arrays: Any) -> Any:
            self._arrived.release()
            assert self.open.wait(30)
            self.runs.append(arrays[-1])
            return real(*arrays)

        monkeypatch.setattr(graphs, door, through)

    @property
    def sizes(self) -> list[int]:
        return [len(rows) for rows in self.runs]

    async def somebody(self) -> None:
        """Until one more run stands before the door."""
        assert await asyncio.to_thread(self._arrived.acquire, timeout=30)


@pytest.fixture(scope="session")
def run() -> Callable[..., Metrics]:
    """run(body, **settings): run a coroutine function with an engine of one runner, unless told otherwise."""

    def run(body: Callable[[Engine], Coroutine[Any, Any, None]], **settings: Any) -> Metrics:
        metrics = Metrics()

        async def whole() -> None:
            engine = Engine(EngineSettings(**{"runners": 1, "threads": 1} | settings), metrics)
            await engine.start()
            await body(engine)
            await asyncio.wait_for(engine.stop(), 30)

        asyncio.run(whole())
        return metrics

    return run


@pytest.fixture(scope="session")
def images() -> Callable[..., np.ndarray]:
    """images(count, seed=0): noise without the value 255."""
    return lambda count, seed=0: np.random.default_rng(seed).integers(0, 255, (count, 3, 16, 16), np.uint8)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Gate]:
    """gated(champion, door="embed"): a gate before each run of one of its graphs."""
    return lambda champion, door="embed": Gate(champion.bundle.graphs, monkeypatch, door)


@pytest.fixture(scope="session")
def champion() -> Callable[[Path], Champion]:
    """champion(bundle): the bundle as one that serves."""

    def opened(path: Path) -> Champion:
        bundle = Bundle.open(path)
        return Champion(bundle, bundle.manifest.id, "toy", "1", str(path))

    return opened


@pytest.fixture
def model(champion: Callable[[Path], Champion], features_bundle: Path) -> Champion:
    return champion(features_bundle)
