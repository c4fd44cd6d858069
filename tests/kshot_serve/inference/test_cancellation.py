"""Images whose time is up or whose client has gone, and engines that stop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kshot_serve.errors import Problem
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champion import Champion
from kshot_serve.observe.metrics import Metrics

Run = Callable[..., Metrics]  # of conftest.py, as the others here
Images = Callable[..., np.ndarray]
Gated = Callable[..., Any]


def soon() -> float:
    return time.monotonic() + 30


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_an_image_past_its_deadline_is_never_run(model: Champion, run: Run, images: Images, gated: Gated) -> None:
    """gh:triton-inference-server/server#6796: time-outs that were not honoured."""
    gate = gated(model)

    async def body(engine: Engine) -> None:
        first = asyncio.create_task(engine.embed(model, images(1), soon()))
        await gate.somebody()
        late = asyncio.create_task(engine.embed(model, images(3, seed=1), time.monotonic() - 1))
        in_time = asyncio.create_task(engine.embed(model, images(1, seed=2), soon()))
        await settle()
        gate.open.set()
        with pytest.raises(Problem) as told:
            await late
        assert (told.value.code, told.value.status) == ("too_late", 503)
        await asyncio.gather(first, in_time)

    metrics = run(body)
    assert gate.sizes == [1, 1]
    assert metrics.registry.get_sample_value("kshot_dropped_images_total", {"why": "late"}) == 3
    assert metrics.registry.get_sample_value("kshot_queued_images") == 0


def test_images_of_a_client_that_has_gone_are_never_run(
    model: Champion, run: Run, images: Images, gated: Gated
) -> None:
    """gh:ray-project/ray#41057: clients that gave up slowed the traffic after them."""
    gate = gated(model)

    async def body(engine: Engine) -> None:
        running = asyncio.create_task(engine.embed(model, images(1), soon()))
        await gate.somebody()
        gone = [asyncio.create_task(engine.embed(model, images(8, seed), soon())) for seed in range(1, 5)]
        stays = asyncio.create_task(engine.embed(model, images(2, seed=9), soon()))
        await settle()
        for task in [running, *gone]:
            task.cancel()
        await settle()
        gate.open.set()
        assert (await stays).shape == (2, model.bundle.manifest.features)

    metrics = run(body)
    assert gate.sizes == [1, 2]
    assert metrics.registry.get_sample_value("kshot_dropped_images_total", {"why": "gone"}) == 32
    assert metrics.registry.get_sample_value("kshot_queued_images") == 0


def test_work_of_a_caller_that_has_gone_is_not_begun(run: Run) -> None:
    async def body(engine: Engine) -> None:
        begun, free = [], threading.Event()
        busy = asyncio.create_task(engine.in_thread(free.wait, 30))
        gone = asyncio.create_task(engine.in_thread(begun.append, "gone"))
        await settle()
        gone.cancel()
        await settle()
        free.set()
        assert await busy
        await engine.in_thread(begun.append, "here")
        assert begun == ["here"]

    run(body, decoders=1)


def test_the_oldest_image_tells_a_watchdog_that_the_engine_stalls(
    model: Champion, run: Run, images: Images, gated: Gated
) -> None:
    """gh:ray-project/ray#61263: health was well while nothing was served."""
    gate = gated(model)

    async def body(engine: Engine) -> None:
        assert engine.oldest < 0.01
        call = asyncio.create_task(engine.embed(model, images(1), soon()))
        await gate.somebody()
        await asyncio.sleep(0.02)
        assert engine.oldest >= 0.02
        gate.open.set()
        await call
        assert engine.oldest < 0.01

    run(body)


def test_stopping_answers_what_was_admitted_and_admits_no_more(
    model: Champion, run: Run, images: Images, gated: Gated
) -> None:
    """gh:triton-inference-server/server#6230, #8253: shutting down dropped requests."""
    gate = gated(model)

    async def body(engine: Engine) -> None:
        async def admitted() -> np.ndarray:
            with engine.admit(2):
                first = await engine.embed(model, images(1), soon())
                return np.concatenate([first, await engine.embed(model, images(1, seed=1), soon())])

        call = asyncio.create_task(admitted())
        await gate.somebody()
        stopping = asyncio.create_task(engine.stop())
        await settle()
        with pytest.raises(Problem) as told:
            engine.admission.check()
        assert (told.value.code, told.value.status) == ("draining", 503)
        assert not stopping.done()
        gate.open.set()
        assert len(await call) == 2  # the second run too, though it was asked for while stopping
        await stopping
        with pytest.raises(Problem, match="has stopped"):
            await engine.embed(model, images(1), soon())

    run(body)


def test_stopping_waits_for_work_that_nobody_waits_for_no_longer_than_it_is_told(
    model: Champion, run: Run, images: Images, gated: Gated
) -> None:
    gate = gated(model, "adapt")

    async def body(engine: Engine) -> None:
        features = await engine.embed(model, images(2))
        task = asyncio.create_task(engine.adapt(model, features, np.arange(2), np.arange(2)))
        await gate.somebody()
        assert await engine.stop(0.1) is False
        gate.open.set()
        await task
        assert await engine.stop(0.1) is True

    run(body)
