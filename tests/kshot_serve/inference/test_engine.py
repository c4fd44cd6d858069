"""The engine: images of many requests share runs, and no request feels its neighbours."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from starlette.datastructures import Headers

from kshot_runtime.bundle import Bundle, Graphs
from kshot_runtime.manifest import BundleError
from kshot_serve.budgets import current_caller
from kshot_serve.errors import Problem
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champion import Champion
from kshot_serve.models.cores import _quotas, cores
from kshot_serve.models.warmup import warm
from kshot_serve.observe.metrics import Metrics
from kshot_serve.observe.trace import Request, current
from kshot_serve.settings import EngineSettings

Remake = Callable[[Path, Path, Callable[[onnx.GraphProto], None]], Path]

SIDE = 16


def champion(path: Path) -> Champion:
    bundle = Bundle.open(path)
    return Champion(bundle, bundle.manifest.id, "toy", "1", str(path))


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 3, SIDE, SIDE), np.uint8)  # 255 is not among them


def soon() -> float:
    return time.monotonic() + 30


def run(body: Callable[[Engine], Coroutine[Any, Any, None]], **settings: Any) -> Metrics:
    """Run a test's body with an engine of one runner, unless told otherwise."""
    metrics = Metrics()

    async def whole() -> None:
        engine = Engine(EngineSettings(**{"runners": 1, "threads": 1} | settings), metrics)
        await engine.start()
        await body(engine)
        await asyncio.wait_for(engine.stop(), 30)

    asyncio.run(whole())
    return metrics


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


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


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


def not_a_number(graph: onnx.GraphProto) -> None:
    nan = constant(graph, "nan", np.array(np.nan, np.float32))
    graph.node.append(helper.make_node("Mul", ["plain", nan], ["features"]))


def looks_at_companions(graph: onnx.GraphProto) -> None:
    axes = constant(graph, "row_axis", np.array([0], np.int64))
    graph.node.append(helper.make_node("ReduceMean", ["plain", axes], ["mean"], keepdims=1))
    graph.node.append(helper.make_node("Sub", ["plain", "mean"], ["features"]))


def one_size_only(graph: onnx.GraphProto) -> None:
    shape = constant(graph, "frozen", np.array([2, -1], np.int64))
    graph.node.append(helper.make_node("Reshape", ["plain", shape], ["features"]))


@pytest.fixture(scope="session")
def delicate(features_bundle: Path, remake: Remake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return remake(features_bundle, tmp_path_factory.mktemp("delicate") / "bundle", fails_on_white)


@pytest.fixture
def model(features_bundle: Path) -> Champion:
    return champion(features_bundle)


# What comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runners", [1, 3])
def test_each_caller_gets_the_features_of_its_own_images(model: Champion, runners: int) -> None:
    batches = [images(count, seed=count) for count in (1, 2, 3, 5, 8, 13, 21, 40)]
    expected = [model.bundle.graphs.embed(batch) for batch in batches]

    async def body(engine: Engine) -> None:
        found = await asyncio.gather(*[engine.embed(model, batch, soon()) for batch in batches])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)

    run(body, runners=runners)


def test_adapting_takes_the_inner_steps_of_the_number_of_photos(images_bundle: Path) -> None:
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
    images_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = champion(images_bundle)
    support, labels = images(4), np.arange(4)
    queries = [images(1, seed) for seed in range(6)]

    async def body(engine: Engine) -> None:
        states = [await engine.adapt(model, support[order], labels, labels) for order in ([0, 1, 2, 3], [3, 2, 1, 0])]
        expected = [model.bundle.graphs.classify(state, query) for state in states for query in queries]
        gate = Gate(model.bundle.graphs, monkeypatch, "classify")
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
    images_bundle: Path, monkeypatch: pytest.MonkeyPatch
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


def test_a_server_without_room_for_sessions_makes_none(images_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = champion(images_bundle)
    monkeypatch.setattr(model.bundle.graphs, "baked", None)

    async def body(engine: Engine) -> None:
        state = await engine.adapt(model, images(2), np.arange(2), np.arange(2))
        await engine.classify(model, state, 0, images(3), soon())

    run(body, sessions_mb=0)


def test_features_are_classified_as_they_are(model: Champion) -> None:
    async def body(engine: Engine) -> None:
        features = await engine.embed(model, images(6), soon())
        state = await engine.adapt(model, features[:3], np.arange(3), np.arange(3))
        found = await engine.classify(model, state, "space", features, soon())
        assert found["logits"].shape == (6, 3)
        assert (found["logits"][:3].argmax(1) == np.arange(3)).all()
        assert found["query_features"] is features

    run(body)


def test_little_work_is_done_where_it_is_and_answers_alike(model: Champion, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_stages_are_timed_for_the_request_that_waits(model: Champion) -> None:
    async def body(engine: Engine) -> None:
        current.set(request := Request.begin(Headers()))
        await engine.embed(model, images(1), soon())
        assert set(request.stages) == {"queue", "infer"}

    run(body)


# Batches ----------------------------------------------------------------------------------------------------------


def test_only_sizes_that_were_warmed_are_ever_run(model: Champion, monkeypatch: pytest.MonkeyPatch) -> None:
    """gh:microsoft/onnxruntime#24376, #22297: memory grows with each new shape; gh:microsoft/onnxruntime#6978: each is
    slow once."""
    buckets = (1, 4, 16)
    gate = Gate(model.bundle.graphs, monkeypatch)
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


def test_little_is_padded_on_a_cpu(model: Champion, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(model.bundle.graphs, monkeypatch)
    gate.open.set()

    async def body(engine: Engine) -> None:
        await engine.embed(model, images(5), soon())
        await engine.embed(model, images(7), soon())

    run(body)
    assert gate.sizes == [4, 1, 8]


def test_large_images_go_few_at_a_time_on_a_cpu(model: Champion, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(model.bundle.graphs, monkeypatch)
    gate.open.set()

    async def body(engine: Engine) -> None:
        for halves in (10, 1):
            monkeypatch.setattr("kshot_serve.inference.engine._CACHED", halves * images(1).nbytes // 2)
            await engine.embed(model, images(9), soon())

    run(body)
    assert gate.sizes == [4, 4, 1, *[1] * 9]


def test_an_image_alone_waits_for_nobody_and_the_next_batch_is_what_came_meanwhile(
    model: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(model.bundle.graphs, monkeypatch)

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
    images_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = champion(images_bundle)
    state = model.bundle.graphs.adapt(images(2), np.arange(2), np.arange(2), 2)
    gate = Gate(model.bundle.graphs, monkeypatch, "classify")

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
    model: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(model.bundle.graphs, monkeypatch)

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


def test_background_work_gives_way(model: Champion, monkeypatch: pytest.MonkeyPatch) -> None:
    """gh:triton-inference-server/server#5042: a new model's loading delayed live requests for minutes."""
    gate = Gate(model.bundle.graphs, monkeypatch)

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


# One bad image ----------------------------------------------------------------------------------------------------


def test_an_image_that_fails_the_model_fails_alone(delicate: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_wrong_shape_is_refused_before_it_meets_others(model: Champion) -> None:
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


# Too many, too late, gone -----------------------------------------------------------------------------------------


def test_background_work_takes_no_places(model: Champion, monkeypatch: pytest.MonkeyPatch) -> None:
    """gh:triton-inference-server/server#5042: requests failed while a new model was made ready."""
    gate = Gate(model.bundle.graphs, monkeypatch)

    async def body(engine: Engine) -> None:
        supports = asyncio.create_task(engine.embed(model, images(40)))
        await gate.somebody()
        with engine.admit(8):
            gate.open.set()
            await supports

    run(body, queue=8)


def test_an_image_past_its_deadline_is_never_run(model: Champion, monkeypatch: pytest.MonkeyPatch) -> None:
    """gh:triton-inference-server/server#6796: time-outs that were not honoured."""
    gate = Gate(model.bundle.graphs, monkeypatch)

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


def test_images_of_a_client_that_has_gone_are_never_run(model: Champion, monkeypatch: pytest.MonkeyPatch) -> None:
    """gh:ray-project/ray#41057: clients that gave up slowed the traffic after them."""
    gate = Gate(model.bundle.graphs, monkeypatch)

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


def test_work_of_a_caller_that_has_gone_is_not_begun(model: Champion) -> None:
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
    model: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gh:ray-project/ray#61263: health was well while nothing was served."""
    gate = Gate(model.bundle.graphs, monkeypatch)

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


# The end ----------------------------------------------------------------------------------------------------------


def test_stopping_answers_what_was_admitted_and_admits_no_more(
    model: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gh:triton-inference-server/server#6230, #8253: shutting down dropped requests."""
    gate = Gate(model.bundle.graphs, monkeypatch)

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
    model: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(model.bundle.graphs, monkeypatch, "adapt")

    async def body(engine: Engine) -> None:
        features = await engine.embed(model, images(2))
        task = asyncio.create_task(engine.adapt(model, features, np.arange(2), np.arange(2)))
        await gate.somebody()
        assert await engine.stop(0.1) is False
        gate.open.set()
        await task
        assert await engine.stop(0.1) is True

    run(body)


# Before it counts -------------------------------------------------------------------------------------------------


def test_warming_runs_each_size_of_both_kinds_of_bundle(features_bundle: Path, images_bundle: Path) -> None:
    for path in (features_bundle, images_bundle):
        warm(Bundle.open(path), (1, 2, 4))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (not_a_number, "not finite"),
        (looks_at_companions, "depends on the other images"),
        (one_size_only, "the graph"),
    ],
)
def test_a_bundle_that_cannot_serve_is_found_before_it_does(
    features_bundle: Path, remake: Remake, tmp_path: Path, change: Callable[[onnx.GraphProto], None], why: str
) -> None:
    """gh:pytorch/pytorch#169178: an export that was simply wrong; gh:pytorch/pytorch#148886: the batch frozen."""
    bundle = Bundle.open(remake(features_bundle, tmp_path / "bundle", change))
    with pytest.raises(BundleError, match=why):
        warm(bundle, (1, 2, 4))


def test_threads_are_as_many_as_cores_that_may_be_used(tmp_path: Path) -> None:
    assert 1 <= cores() <= 4096
    assert list(_quotas(tmp_path)) == []
    for content, quota in (("max 100000", None), ("150000 100000", 1.5)):
        (tmp_path / "cpu.max").write_text(content + "\n")
        assert list(_quotas(tmp_path)) == ([] if quota is None else [quota])
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("400000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert list(_quotas(tmp_path)) == [1.5, 4.0]
