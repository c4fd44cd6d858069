"""What the engine gives: each caller the results of its own images, whatever is among the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from starlette.datastructures import Headers

from kshot_serve.errors import Problem
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champion import Champion
from kshot_serve.observe.metrics import Metrics
from kshot_serve.observe.trace import Request, current
from kshot_serve.settings import EngineSettings

Remake = Callable[[Path, Path, Callable[[onnx.GraphProto], None]], Path]
Run = Callable[..., Metrics]  # of conftest.py, as the others here
Images = Callable[..., np.ndarray]
Gated = Callable[..., Any]
Opened = Callable[[Path], Champion]
SIDE = 16


def soon() -> float:
    return time.monotonic() + 30


def constant(graph: onnx.GraphProto, name: str, values: np.ndarray) -> str:
    graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return name


def fails_on_white(graph: onnx.GraphProto) -> None:
    """A look-up by the brightest pixel, in a table of 255 entries: 255 has none, and the whole run fails."""
    axes = constant(graph, "pixel_axes", np.array([1, 2, 3], np.int64))
    table = constant(graph, "table", np.zeros((255, 1), np.float32))
    graph.node.extend(
        [
            helper.make_node("Cast", ["images"], ["whole"], to=TensorProto.INT64),
            helper.make_node("ReduceMax", ["whole", axes], ["brightest"], keepdims=0),
            helper.make_node("Gather", [table, "brightest"], ["looked_up"]),
            helper.make_node("Add", ["plain", "looked_up"], ["features"]),
        ]
    )


@pytest.fixture(scope="session")
def delicate(features_bundle: Path, remake: Remake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return remake(features_bundle, tmp_path_factory.mktemp("delicate") / "bundle", fails_on_white)


@pytest.mark.parametrize("runners", [1, 3])
def test_each_caller_gets_the_features_of_its_own_images(
    model: Champion, runners: int, run: Run, images: Images
) -> None:
    batches = [images(count, seed=count) for count in (1, 2, 3, 5, 8, 13, 21, 40)]
    expected = [model.bundle.graphs.embed(batch) for batch in batches]

    async def body(engine: Engine) -> None:
        found = await asyncio.gather(*[engine.embed(model, batch, soon()) for batch in batches])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)

    run(body, runners=runners)


def test_adapting_takes_the_inner_steps_of_the_number_of_photos(
    images_bundle: Path, run: Run, images: Images, champion: Opened
) -> None:
    model = champion(images_bundle)
    model.bundle.manifest = model.bundle.manifest.model_copy(update={"steps_by_shots": {1: 0, 2: 1}})

    async def body(engine: Engine) -> None:
        for shots, steps in ((1, 0), (2, 1)):
            given = images(2 * shots), np.arange(2).repeat(shots), np.arange(2)
            found, expected = await engine.adapt(model, *given), model.bundle.graphs.adapt(*given, steps)
            for name, value in found.items():
                np.testing.assert_allclose(value, expected[name], atol=1e-5)
            assert found["head.weight"].any() == bool(steps)

    run(body)


def test_images_of_one_state_share_a_run_and_each_state_answers_for_itself(
    images_bundle: Path, run: Run, images: Images, gated: Gated, champion: Opened
) -> None:
    model = champion(images_bundle)
    support, labels = images(4), np.arange(4)
    queries = [images(1, seed) for seed in range(6)]

    async def body(engine: Engine) -> None:
        states = [await engine.adapt(model, support[order], labels, labels) for order in ([0, 1, 2, 3], [3, 2, 1, 0])]
        expected = [model.bundle.graphs.classify(state, query) for state in states for query in queries]
        gate = gated(model, "classify")
        calls = [
            asyncio.create_task(engine.classify(model, states[i], ("space", i), query, soon()))
            for i in (0, 1)
            for query in queries
        ]
        await gate.somebody()
        gate.open.set()
        for found, same in zip(await asyncio.gather(*calls), expected, strict=True):
            assert list(found) == list(same) == ["logits", "query_features"]
            for name, values in found.items():
                np.testing.assert_allclose(values, same[name], atol=1e-4)
        assert gate.sizes == [1, 4, 8, 1]  # who came first; most of the other five; the second state's six; the last

    run(body, sessions_mb=0)


def test_states_with_weights_have_sessions_that_answer_alike(
    images_bundle: Path, monkeypatch: pytest.MonkeyPatch, run: Run, images: Images, champion: Opened
) -> None:
    model = champion(images_bundle)
    graphs, made = model.bundle.graphs, []
    real = graphs.baked
    monkeypatch.setattr(graphs, "baked", lambda state: (made.append(state), real(state))[1])
    query, labels = images(3), np.arange(2)

    async def body(engine: Engine) -> None:
        states = [await engine.adapt(model, images(2, seed), labels, labels) for seed in range(3)]

        async def ask(i: int, *, once: bool = False) -> list[int]:
            """The states that have got a session so far."""
            found = await engine.classify(model, states[i], i, query, soon(), once=once)
            for name, values in graphs.classify(states[i], query).items():
                np.testing.assert_allclose(found[name], values, atol=1e-4)
            return [next(j for j, state in enumerate(states) if state is each) for each in made]

        assert await ask(0, once=True) == []
        assert await ask(0) == await ask(0) == [0]
        assert await ask(1) == await ask(0) == [0, 1]
        assert await ask(2) == await ask(0) == [0, 1, 2]  # in the place of 1, which was used the least
        assert await ask(1) == [0, 1, 2, 1]
        engine.forget(1)
        assert await ask(1) == [0, 1, 2, 1, 1]

    run(body, sessions_mb=2)


def test_workers_divide_the_cores_and_each_has_a_queue_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kshot_serve.inference.engine.cores", lambda: 8)
    alone, one_of_four = (Engine(EngineSettings(), Metrics(), workers) for workers in (1, 4))
    assert (alone._at_once * alone.open.threads, alone.decoders) == (8, 8)
    assert (one_of_four._at_once * one_of_four.open.threads, one_of_four.decoders) == (2, 2)
    for engine in (alone, one_of_four):
        with engine.admit(64):
            with engine.admit(64):
                pass
            with pytest.raises(Problem), engine.admit(65):
                pass


def test_a_server_without_room_for_sessions_makes_none(
    images_bundle: Path, monkeypatch: pytest.MonkeyPatch, run: Run, images: Images, champion: Opened
) -> None:
    model = champion(images_bundle)
    monkeypatch.setattr(model.bundle.graphs, "baked", None)

    async def body(engine: Engine) -> None:
        state = await engine.adapt(model, images(2), np.arange(2), np.arange(2))
        await engine.classify(model, state, 0, images(3), soon())

    run(body, sessions_mb=0)


def test_features_are_classified_as_they_are(model: Champion, run: Run, images: Images) -> None:
    async def body(engine: Engine) -> None:
        features = await engine.embed(model, images(6), soon())
        state = await engine.adapt(model, features[:3], np.arange(3), np.arange(3))
        found = await engine.classify(model, state, "space", features, soon())
        assert found["logits"].shape == (6, 3)
        assert (found["logits"][:3].argmax(1) == np.arange(3)).all()
        assert found["query_features"] is features

    run(body)


def test_little_work_is_done_where_it_is_and_answers_alike(
    model: Champion, monkeypatch: pytest.MonkeyPatch, run: Run, images: Images
) -> None:
    threads: list[str] = []
    real = model.bundle.graphs.classify

    def classify(*given: Any) -> Any:
        threads.append(threading.current_thread().name)
        return real(*given)

    monkeypatch.setattr(model.bundle.graphs, "classify", classify)

    async def body(engine: Engine) -> None:
        features = await engine.embed(model, images(4))
        state = await engine.adapt(model, features[:2], np.arange(2), np.arange(2))
        first = await engine.classify(model, state, "a", features)
        engine._paces[model.id] = 1e-9  # as if it had been seen to take next to nothing
        again = await engine.classify(model, state, "a", features)
        np.testing.assert_array_equal(first["logits"], again["logits"])
        engine._paces[model.id] = 1.0
        await engine.classify(model, state, "a", features)

    run(body)
    here = threading.main_thread().name
    assert [name == here for name in threads] == [False, True, False]


def test_stages_are_timed_for_the_request_that_waits(model: Champion, run: Run, images: Images) -> None:
    async def body(engine: Engine) -> None:
        current.set(request := Request.begin(Headers()))
        await engine.embed(model, images(1), soon())
        assert set(request.stages) == {"queue", "infer"}

    run(body)


def test_an_image_that_fails_the_model_fails_alone(
    delicate: Path, caplog: pytest.LogCaptureFixture, run: Run, images: Images, champion: Opened
) -> None:
    """gh:Lightning-AI/LitServe#340: one bad item failed everybody in its batch."""
    model = champion(delicate)
    photos = images(32)
    photos[13] = 255

    async def body(engine: Engine) -> None:
        calls = [engine.embed(model, photos[i : i + 1], soon()) for i in range(32)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        culprit = found.pop(13)
        assert isinstance(culprit, Problem)
        assert culprit.code == "internal"
        assert str(culprit) == "the model fails on this image"
        rest = model.bundle.graphs.embed(np.delete(photos, 13, axis=0))
        np.testing.assert_allclose(np.concatenate(found), rest, atol=1e-4)
        assert (await engine.embed(model, photos[:1], soon())).shape[0] == 1  # and the next are well

    run(body)
    assert "indices element out of data bounds" in caplog.text  # onnxruntime's words are for the log only


def test_a_wrong_shape_is_refused_before_it_meets_others(model: Champion, run: Run, images: Images) -> None:
    """gh:ray-project/ray#66140: an item of a wrong size hung all that came after it."""

    async def body(engine: Engine) -> None:
        wrong = [np.zeros((1, 1, SIDE, SIDE), np.uint8), np.zeros((1, 3, SIDE, SIDE), np.float32), images(0)]
        good = engine.embed(model, images(3), soon())
        found = await asyncio.gather(
            *[engine.embed(model, batch, soon()) for batch in wrong], good, return_exceptions=True
        )
        assert [problem.code for problem in found[:3] if isinstance(problem, Problem)] == ["bad_request"] * 3
        assert isinstance(found[3], np.ndarray)

    run(body)
