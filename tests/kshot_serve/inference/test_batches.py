"""Which images share a run of the model, and in which order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kshot_serve.budgets import current_caller
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champion import Champion
from kshot_serve.models.warmup import warm
from kshot_serve.observe.metrics import Metrics

Run = Callable[..., Metrics]  # of conftest.py, as the others here
Images = Callable[..., np.ndarray]
Gated = Callable[..., Any]
Opened = Callable[[Path], Champion]


def soon() -> float:
    return time.monotonic() + 30


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_only_sizes_that_were_warmed_are_ever_run(model: Champion, run: Run, images: Images, gated: Gated) -> None:
    """gh:microsoft/onnxruntime#24376, #22297: memory grows with each new shape; gh:microsoft/onnxruntime#6978: each is
    slow once."""
    buckets = (1, 4, 16)
    gate = gated(model)
    gate.open.set()
    warm(model.bundle, buckets)
    warmed = set(gate.sizes)
    gate.runs.clear()

    async def body(engine: Engine) -> None:
        for count in range(1, 40):
            parts = [images(1 + i % 3, i) for i in range(count)]
            await asyncio.gather(*[engine.embed(model, part, soon()) for part in parts])

    run(body, buckets=buckets)
    assert set(gate.sizes) == warmed == set(buckets)


def test_little_is_padded_on_a_cpu(model: Champion, run: Run, images: Images, gated: Gated) -> None:
    gate = gated(model)
    gate.open.set()

    async def body(engine: Engine) -> None:
        await engine.embed(model, images(5), soon())
        await engine.embed(model, images(7), soon())

    run(body)
    assert gate.sizes == [4, 1, 8]


def test_large_images_go_few_at_a_time_on_a_cpu(
    model: Champion, monkeypatch: pytest.MonkeyPatch, run: Run, images: Images, gated: Gated
) -> None:
    gate = gated(model)
    gate.open.set()

    async def body(engine: Engine) -> None:
        for halves in (10, 1):
            monkeypatch.setattr("kshot_serve.inference.engine._CACHED", halves * images(1).nbytes // 2)
            await engine.embed(model, images(9), soon())

    run(body)
    assert gate.sizes == [4, 4, 1, *[1] * 9]


def test_an_image_alone_waits_for_nobody_and_the_next_batch_is_what_came_meanwhile(
    model: Champion, run: Run, images: Images, gated: Gated
) -> None:
    gate = gated(model)

    async def body(engine: Engine) -> None:
        calls = [asyncio.create_task(engine.embed(model, images(1), soon()))]
        await gate.somebody()
        calls += [asyncio.create_task(engine.embed(model, images(1, seed), soon())) for seed in range(1, 17)]
        await settle()
        gate.open.set()
        await asyncio.gather(*calls)

    run(body)
    assert gate.sizes == [1, 16]


def test_nobody_waits_behind_the_many_images_of_another_space(
    images_bundle: Path, run: Run, images: Images, gated: Gated, champion: Opened
) -> None:
    model = champion(images_bundle)
    state = model.bundle.graphs.adapt(images(2), np.arange(2), np.arange(2), 2)
    gate = gated(model, "classify")

    async def body(engine: Engine) -> None:
        many = asyncio.create_task(engine.classify(model, state, "busy", images(100), soon()))
        await gate.somebody()
        one = asyncio.create_task(engine.classify(model, state, "other", images(1, seed=9), soon()))
        await settle()
        gate.open.set()
        await asyncio.gather(many, one)

    run(body, sessions_mb=0)
    assert gate.sizes == [32, 32, 1, 32, 4]  # in turns


def test_callers_share_a_batch_however_many_images_one_of_them_has(
    model: Champion, run: Run, images: Images, gated: Gated
) -> None:
    gate = gated(model)

    async def body(engine: Engine) -> None:
        async def ask(caller: str, count: int) -> np.ndarray:
            current_caller.set(caller)
            return await engine.embed(model, images(count, count), soon())

        first = asyncio.create_task(ask("greedy", 1))
        await gate.somebody()
        greedy = [asyncio.create_task(ask("greedy", 40)) for _ in range(3)]
        await settle()
        other = asyncio.create_task(ask("other", 2))
        await settle()
        gate.open.set()
        await other
        assert not any(call.done() for call in greedy)
        np.testing.assert_allclose(other.result(), model.bundle.graphs.embed(images(2, 2)), atol=1e-4)
        for found in await asyncio.gather(*greedy):
            np.testing.assert_allclose(found, model.bundle.graphs.embed(images(40, 40)), atol=1e-4)
        await first

    run(body)
    assert gate.sizes[:2] == [1, 32]


def test_background_work_gives_way(model: Champion, run: Run, images: Images, gated: Gated) -> None:
    """gh:triton-inference-server/server#5042: a new model's loading delayed live requests for minutes."""
    gate = gated(model)

    async def body(engine: Engine) -> None:
        supports = asyncio.create_task(engine.embed(model, images(40)))
        await gate.somebody()
        live = asyncio.create_task(engine.embed(model, images(1), soon()))
        await settle()
        gate.open.set()
        await live
        assert not supports.done()
        assert (await supports).shape == (40, model.bundle.manifest.features)

    run(body)
    assert gate.sizes == [8, 1, 8, 8, 8, 8]


def test_background_work_takes_no_places(model: Champion, run: Run, images: Images, gated: Gated) -> None:
    """gh:triton-inference-server/server#5042: requests failed while a new model was made ready."""
    gate = gated(model)

    async def body(engine: Engine) -> None:
        supports = asyncio.create_task(engine.embed(model, images(40)))
        await gate.somebody()
        with engine.admit(8):
            gate.open.set()
            await supports

    run(body, queue=8)
