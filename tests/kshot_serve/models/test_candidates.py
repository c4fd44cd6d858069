"""New versions are tried in a process of their own: one that hangs or crashes there ends nothing but its own trial."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

World = Callable[..., Any]
Until = Callable[..., None]  # of conftest.py
Remake = Callable[[Path, Path, Callable[[onnx.GraphProto], None]], Path]

KSHOT = Path(sys.executable).with_name("kshot")


def never_ends(graph: onnx.GraphProto) -> None:
    """The features, after a loop of 2^62 rounds."""
    value = helper.make_tensor_value_info("value", TensorProto.FLOAT, None)
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["goes on"]), helper.make_node("Identity", ["value in"], ["value"])],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value in", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor_value_info("goes on", TensorProto.BOOL, []), value],
    )
    graph.initializer.append(numpy_helper.from_array(np.array(2**62, np.int64), "rounds"))
    graph.initializer.append(numpy_helper.from_array(np.array(True), "begins"))
    graph.node.append(helper.make_node("Loop", ["rounds", "begins", "plain"], ["features"], body=body))


@pytest.fixture(scope="module")
def stuck(features_bundle: Path, remake: Remake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose hashes are right, and whose first run never ends."""
    return remake(features_bundle, tmp_path_factory.mktemp("stuck") / "bundle", never_ends)


def test_a_candidate_that_hangs_is_refused_in_time_and_the_next_version_taken(
    new_world: World, shop: Any, bundles: list[Path], stuck: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """B3b: it stopped all promotions for good, and nothing told."""
    shop.sell(bundles[0])

    async def body() -> None:
        async with new_world(shop.source, tmp_path, shop.address) as world:
            world.settings = world.champions._settings = world.settings.model_copy(update={"candidate_s": 30.0})
            since = "kshot_candidate_start_time_seconds"
            assert world.metric(since) == 0
            await asyncio.to_thread(shop.sell, stuck)
            registry = world.champions._registry
            world.champions._shelf.fetch(registry, registry.find())  # the time is for the model alone
            following = asyncio.create_task(world.champions.follow())
            while not world.metric(since):
                assert not following.done()
                await asyncio.sleep(0.01)
            assert time.time() - 60 < world.metric(since) <= time.time()
            await world.sound()  # and is served meanwhile
            await following
            assert world.metric(since) == 0
            assert world.metric("kshot_champion_swaps_total", outcome="refused", reason="late") == 1
            why = "version 2 was refused: it was not loaded and warm in time"
            assert (world.champions.degraded, world.version) == (f"{why}; version 1 serves", "1")
            assert [record.getMessage() for record in caplog.records if why in record.getMessage()] == [
                f"{why}: it was not loaded and warm within 30 s (candidate_s)"
            ]
            await world.champions.follow()  # it is not tried again soon
            assert world.metric("kshot_champion_swaps_total", outcome="refused", reason="late") == 1
            world.champions._settings = world.settings.model_copy(update={"candidate_s": 120.0})
            await asyncio.to_thread(shop.sell, bundles[1])
            await world.champions.follow()
            assert (world.version, world.champions.degraded) == ("3", None)
            await world.sound()

    asyncio.run(body())


def test_a_candidate_that_crashes_is_refused_and_the_next_version_taken(
    new_world: World, shop: Any, bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process ends by a signal, as of a fault in native code, or of too little memory."""
    shop.sell(bundles[0])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text("import os\nos.kill(os.getpid(), 11)\n")

    async def body() -> None:
        async with new_world(shop.source, tmp_path, shop.address) as world:
            await asyncio.to_thread(shop.sell, bundles[1])
            with monkeypatch.context() as patch:
                patch.setenv("PYTHONPATH", str(tmp_path / "broken"), prepend=os.pathsep)
                await world.champions.follow()
            assert world.version == "1"
            assert world.metric("kshot_champion_swaps_total", outcome="refused", reason="crashed") == 1
            assert world.champions.degraded.startswith("version 2 was refused: the process that tried it crashed")
            assert world.settings.candidate_s == 120
            refused = time.monotonic()
            for minutes, serves in ((19, "1"), (20, "2")):  # then it is tried again, and is sound by now
                with monkeypatch.context() as patch:
                    later = refused + 60 * minutes
                    patch.setattr("kshot_serve.models.champions.monotonic", lambda now=later: now)
                    await world.champions.follow()
                assert world.version == serves
            await asyncio.to_thread(shop.sell, bundles[2])
            await world.champions.follow()
            assert world.version == "3"

    asyncio.run(body())


def test_loading_that_hangs_here_though_it_did_not_in_the_trial_does_not_stop_promotions(
    new_world: World, shop: Any, bundles: list[Path], tmp_path: Path
) -> None:
    shop.sell(bundles[0])

    async def body() -> None:
        async with new_world(shop.source, tmp_path, shop.address) as world:
            sound, settings = world.champions._loader, world.champions._settings
            await asyncio.to_thread(shop.sell, bundles[1])
            version = world.champions._registry.find()
            folder = world.champions._shelf.fetch(world.champions._registry, version)
            world.champions._loader = lambda _: time.sleep(30)
            world.champions._settings = settings.model_copy(update={"candidate_s": 0.2})
            with pytest.raises(Exception, match=re.escape("not loaded and warm within 0.2 s")):
                await world.champions._change(version, folder)
            world.champions._loader, world.champions._settings = sound, settings
            await world.champions.follow()
            assert world.version == "2"

    asyncio.run(body())


def test_a_server_that_is_told_to_end_while_a_candidate_hangs_exits_with_0(
    shop: Any, bundles: list[Path], stuck: Path, tmp_path: Path, until: Until
) -> None:
    """B3b: it ended in SIGABRT. The process that tried the candidate ends too."""
    program = f"""
from pathlib import Path
from kshot_serve.server.run import serve
from kshot_serve.settings import Settings

serve(Settings(source={shop.source!r}, registry={shop.address!r}, folder=Path({str(tmp_path)!r}), port=0, leave_s=0,
               poll_s=0.5), lambda line: print(line, flush=True))
"""
    shop.sell(bundles[0])
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert b"version 1" in process.stdout.readline()
        shop.sell(stuck)
        shelf = tmp_path / "champions"
        until(lambda: sum(path.is_dir() and path.name[0] != "." for path in shelf.iterdir()) == 2)  # it is fetched
        [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        until(lambda: not Path(f"/proc/{child}").exists())
    finally:
        process.kill()
        process.communicate()


# The last good bundle first, then the registry ------------------------------------------------------------------------


@pytest.mark.parametrize("registry", ["refuses", "is silent"])
def test_the_last_good_bundle_serves_before_the_registry_has_answered(
    shop: Any, bundles: list[Path], tmp_path: Path, registry: str
) -> None:
    """B1: ready after 21 and 27 s, though the bundle was on the disk. This registry never answers at all."""
    shop.sell(bundles[0])
    first = serving(shop.source, tmp_path, shop.address)
    try:
        assert b"version 1" in first.stdout.readline()
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if registry == "is silent":
            silent.listen()
            silent.settimeout(60)
        again = serving(shop.source, tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
        try:
            line = again.stdout.readline()
            assert b"version 1" in line
            if registry == "is silent":
                asked, _ = silent.accept()  # it does ask, and is kept waiting
                with httpx.Client(base_url=line.decode().split()[-1], timeout=60) as http:
                    assert "kshot_degraded 1.0" in http.get("/metrics").text
                    why = http.get("/v1/model").json()["degraded"]
                assert why == "the registry has not answered yet; version 1 serves"
                asked.close()
            again.send_signal(signal.SIGTERM)
            again.communicate(timeout=60)
            assert again.returncode == 0
        finally:
            again.kill()
            again.communicate()


def serving(source: str, folder: Path, registry: str) -> Any:
    return subprocess.Popen(
        [KSHOT, "serve", source, "--port", "0", "--folder", folder],
        env=os.environ | {"MLFLOW_TRACKING_URI": registry},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_copy_that_is_damaged_is_fetched_anew(
    new_world: World, shop: Any, bundles: list[Path], tmp_path: Path
) -> None:
    shop.sell(bundles[0])

    async def body() -> None:
        async with new_world(shop.source, tmp_path, shop.address) as world:
            assert world.version == "1"
        [copy] = [path for path in (tmp_path / "champions").iterdir() if path.is_dir()]
        shutil.rmtree(copy)
        copy.mkdir()
        async with new_world(shop.source, tmp_path, shop.address) as world:
            assert (world.version, world.champions.degraded) == ("1", None)
            await world.sound()

    asyncio.run(body())


def test_a_number_is_not_stood_in_for_by_another_version(
    new_world: World, shop: Any, bundles: list[Path], tmp_path: Path
) -> None:
    """The last good bundle is version 2; who asks for version 1 gets it, or waits for it."""
    for bundle in bundles[:2]:
        shop.sell(bundle)

    async def body() -> None:
        async with new_world(shop.source, tmp_path, shop.address) as world:
            assert world.version == "2"
        async with new_world(f"models:/{shop.name}/1", tmp_path, "http://127.0.0.1:1") as world:
            assert not world.champions.ready

    asyncio.run(body())
