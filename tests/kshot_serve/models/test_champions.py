"""Champions come and go, and whoever is served does not notice."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from kshot_runtime.errors import KshotError
from kshot_runtime.manifest import FileFacts
from kshot_serve.errors import Problem
from kshot_serve.models.champion import Champion

World = Callable[..., Any]
Shop = Any
Remake = Callable[[Path, Path, Callable[[onnx.GraphProto], None]], Path]

SIDE = 16
MLFLOW = Path(__file__).parents[3] / "mlflow"


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, SIDE, SIDE), np.uint8)


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 280))


# A bundle by its path ---------------------------------------------------------------------------------------------


def test_a_bundle_serves_from_a_folder_and_from_a_zip(new_world: World, features_bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for file in features_bundle.iterdir():
            archive.write(file, file.name)

    async def body() -> None:
        for source in (features_bundle, tmp_path / "model.zip"):
            async with new_world(str(source), tmp_path) as world:
                champion = world.champions.current
                assert (champion.version, champion.id) == ("0", champion.bundle.manifest.id)
                assert champion.name == source.stem
                await world.sound()

    run(body())


def test_ready_means_loaded_and_warm_and_not_stopping(new_world: World, features_bundle: Path, tmp_path: Path) -> None:
    """gh:triton-inference-server/server#6939, #7588: ready, and yet the model cannot be used."""

    async def body() -> None:
        world = new_world(str(features_bundle), tmp_path)
        seen = []

        async def changing(champion: Champion) -> None:
            seen.append((world.champions.ready, champion.id))

        world.champions.on_change = changing
        with pytest.raises(Problem) as told:
            _ = world.champions.current
        assert (told.value.code, told.value.status) == ("not_ready", 503)
        async with world:
            assert seen == [(False, world.champions.current.id)]
            assert world.champions.ready
            assert world.metric("kshot_ready") == 1
            await world.champions.stop()
            assert not world.champions.ready
            assert world.metric("kshot_ready") == 0
            await world.sound()  # what was accepted is still answered

    run(body())


def test_a_path_without_a_bundle_ends_the_start_with_the_reason(new_world: World, tmp_path: Path) -> None:
    with pytest.raises(KshotError, match="there is no bundle at"):
        run(new_world(str(tmp_path / "nowhere"), tmp_path).__aenter__())  # type: ignore[arg-type]


def test_cuda_where_there_is_none_ends_the_start_with_the_reason(
    new_world: World, features_bundle: Path, tmp_path: Path
) -> None:
    """gh:microsoft/onnxruntime#23372, #17801: it ran on the CPU, and said nothing."""
    try:
        onnxruntime.InferenceSession(features_bundle / "embed.onnx", providers=["CUDAExecutionProvider"])
    except Exception:
        pass
    else:
        if Path("/dev/nvidia0").exists():
            pytest.skip("this machine has a GPU")
    with pytest.raises(KshotError, match="cuda was asked for, but"):
        run(new_world(str(features_bundle), tmp_path, engine={"device": "cuda"}).__aenter__())  # type: ignore[arg-type]


# Following a registry ---------------------------------------------------------------------------------------------


def test_a_new_champion_takes_over_by_itself(new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path) -> None:
    shop.sell(bundles[0])

    async def body() -> None:
        world = new_world(shop.source, tmp_path, shop.address, poll_s=0.05)
        settled = asyncio.Queue[str]()

        async def on_settled(champion: Champion) -> None:
            await settled.put(champion.version)

        world.champions.on_settled = on_settled
        async with world:
            assert await settled.get() == world.version == "1"
            assert world.champions.current.name == shop.name
            await asyncio.to_thread(shop.sell, bundles[1])
            assert await settled.get() == world.version == "2"
            await world.sound()
            assert world.metric("kshot_champion_swaps_total", outcome="taken", reason="") == 2
            labels = {"name": shop.name, "version": "2", "bundle": world.champions.current.id}
            assert world.metric("kshot_champion", **labels) == 1
            assert world.champions.degraded is None

    run(body())


def test_a_fixed_version_stays(new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path) -> None:
    for bundle in bundles[:2]:
        shop.sell(bundle)

    async def body() -> None:
        async with new_world(f"models:/{shop.name}/1", tmp_path, shop.address) as world:
            await world.champions.follow()
            assert world.version == "1"

    run(body())


def test_no_request_fails_while_champions_change(
    new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path
) -> None:
    """gh:triton-inference-server/server#5042: requests failed while a model was loaded."""
    shop.sell(bundles[0])
    factors = {"1": 1, "2": 2, "3": 3, "4": 4}
    photos = images(8)
    served: list[str] = []

    async def body() -> None:
        async with new_world(shop.source, tmp_path, shop.address) as world:
            expected = await world.engine.embed(world.champions.current, photos)

            async def client(number: int) -> None:
                while not over.is_set():
                    champion = world.champions.current
                    found = await world.engine.embed(champion, photos[number : number + 1], time.monotonic() + 30)
                    wanted = factors[champion.version] * expected[number : number + 1]
                    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
                    served.append(champion.version)

            over = asyncio.Event()
            clients = [asyncio.create_task(client(number)) for number in range(4)]
            try:
                for bundle in bundles[1:]:
                    version = await asyncio.to_thread(shop.sell, bundle)
                    await world.champions.follow()
                    assert (world.version, world.champions.degraded) == (version, None)
                await asyncio.to_thread(shop.promote, 1)
                await world.champions.follow()
                assert world.version == "1"
            finally:
                over.set()
                await asyncio.gather(*clients)

    run(body())
    assert set(served) == {"1", "2", "3", "4"}


def test_the_last_two_bundles_stay_on_disk(new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path) -> None:
    shop.sell(bundles[0])

    async def body() -> None:
        async with new_world(shop.source, tmp_path, shop.address) as world:
            for bundle in bundles[1:]:
                await asyncio.to_thread(shop.sell, bundle)
                await world.champions.follow()

    run(body())
    kept = {FileFacts.of((bundle / "bundle.json").read_bytes()).sha256[:16] for bundle in bundles[2:]}
    assert {path.name for path in (tmp_path / "champions").iterdir() if path.is_dir()} == kept


def test_workers_that_fetch_at_once_share_a_shelf(
    new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path
) -> None:
    """Each asks the registry by itself; none takes from the shelf what another stands on."""

    async def body() -> None:
        shop.sell(bundles[0])
        folder, worlds = tmp_path / "serve", []
        async with AsyncExitStack() as stack:
            for _ in range(3):
                worlds.append(await stack.enter_async_context(new_world(shop.source, folder, shop.address)))
            for bundle in bundles[1:]:
                before = {path for path in (folder / "champions").iterdir() if path.is_dir()}
                version = shop.sell(bundle)
                await asyncio.gather(*[world.champions.follow() for world in worlds])
                assert [(world.version, world.champions.degraded) for world in worlds] == [(version, None)] * 3
                kept = {path for path in (folder / "champions").iterdir() if path.is_dir()}
                assert len(kept) == 2
                assert len(kept & before) == 1  # the one before, which serves if this one is refused after a restart

    run(body())


def test_what_a_killed_server_had_begun_to_fetch_is_removed_and_a_damaged_copy_fetched_again(
    new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path
) -> None:
    shop.sell(bundles[0])

    async def once() -> None:
        async with new_world(shop.source, tmp_path, shop.address) as world:
            await world.champions.follow()  # the second time round, the damaged copy has gone
            assert world.version == "1"
            await world.sound()
            assert world.champions.degraded is None

    run(once())
    (folder,) = (path for path in (tmp_path / "champions").iterdir() if path.is_dir())
    (tmp_path / "champions" / ".incoming-abc").mkdir()
    (folder / "embed.onnx").write_bytes(b"half")
    run(once())
    assert {path.name for path in (tmp_path / "champions").iterdir()} == {folder.name, "last.json"}


# Who cannot serve -------------------------------------------------------------------------------------------------


def changed(bundle: Path, shop: Shop, remake: Remake, folder: Path) -> None:
    """The graph is another than was registered."""
    version = shop.register(bundle)
    with (shop.artifacts(version) / "embed.onnx").open("ab") as file:
        file.write(b"\0")
    shop.promote(version)


def renamed(bundle: Path, shop: Shop, remake: Remake, folder: Path) -> None:
    """The manifest is another than was registered, and agrees with its files."""
    version = shop.register(bundle)
    path = shop.artifacts(version) / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibration": []}))
    shop.promote(version)


def outside(bundle: Path, shop: Shop, remake: Remake, folder: Path) -> None:
    """Weights in another file, which is a hard link to a file outside: onnxruntime itself would load it."""

    def change(graph: onnx.GraphProto) -> None:
        weight = max(graph.initializer, key=lambda tensor: len(tensor.raw_data))
        (folder / "secret").write_bytes(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="weights.bin")
        graph.node.append(helper.make_node("Identity", ["plain"], ["features"]))

    made = remake(bundle, folder / "outside", change)
    os.link(folder / "secret", made / "weights.bin")
    shop.sell(made)


def not_finite(bundle: Path, shop: Shop, remake: Remake, folder: Path) -> None:
    """The graph gives no numbers."""

    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(np.nan, np.float32), "nan"))
        graph.node.append(helper.make_node("Mul", ["plain", "nan"], ["features"]))

    shop.sell(remake(bundle, folder / "not finite", change))


def of_tomorrow(bundle: Path, shop: Shop, remake: Remake, folder: Path) -> None:
    """The manifest follows another schema."""
    made = shutil.copytree(bundle, folder / "tomorrow")
    (made / "bundle.json").write_text(
        json.dumps(json.loads((made / "bundle.json").read_text()) | {"schema_version": 9})
    )
    shop.sell(made)


@pytest.mark.parametrize("sell", [changed, renamed, outside, not_finite, of_tomorrow])
def test_a_bundle_that_fails_its_checks_is_refused_and_the_old_one_stays(
    new_world: World, shop: Shop, bundles: list[Path], remake: Remake, tmp_path: Path, sell: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """CVE-2022-25882, CVE-2024-27318, CVE-2025-51480: external data; gh:pytorch/pytorch#169178: a wrong export."""
    shop.sell(bundles[0])
    changes = []

    async def on_change(champion: Champion) -> None:
        changes.append(champion.version)

    async def body() -> None:
        world = new_world(shop.source, tmp_path / "serve", shop.address)
        world.champions.on_change = on_change
        async with world:
            await asyncio.to_thread(sell, bundles[1], shop, remake, tmp_path)
            for _ in range(3):
                await world.champions.follow()
            assert changes == ["1"]
            assert world.version == "1"
            assert world.champions.ready
            await world.sound()
            assert (
                world.metric("kshot_champion_swaps_total", outcome="refused", reason="bundle") == 1
            )  # and not tried again
            assert (
                world.champions.degraded
                == "version 2 was refused: its files or its graphs fail a check; version 1 serves"
            )
            assert sum("version 2 was refused" in record.getMessage() for record in caplog.records) == 1
            await asyncio.to_thread(shop.sell, bundles[2])
            await world.champions.follow()
            assert world.version == "3"
            assert world.champions.degraded is None
            assert world.metric("kshot_degraded") == 0

    run(body())


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (Problem("not_supported", "its images are of another size, and the originals are not kept"), 1),
        (Problem("not_supported", "a label space has 300 classes", reason="limits"), 1),
        (Problem("too_late", "the database is slow today"), 3),
        (Problem("busy", "others write to the database", retry_after=1, reason="database"), 3),
        (OSError("the database is away"), 3),
    ],
)
def test_label_spaces_may_refuse_a_champion_and_accidents_are_tried_again(
    new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path, error: Exception, tries: int
) -> None:
    shop.sell(bundles[0])
    tried = []

    async def on_change(champion: Champion) -> None:
        tried.append(champion.version)
        if champion.version == "2":
            raise error

    async def body() -> None:
        world = new_world(shop.source, tmp_path, shop.address)
        world.champions.on_change = on_change
        async with world:
            await asyncio.to_thread(shop.sell, bundles[1])
            for _ in range(3):
                await world.champions.follow()
            assert tried == ["1"] + ["2"] * tries
            assert world.version == "1"

    run(body())


def test_a_champion_that_label_spaces_were_too_large_for_is_tried_again_later(
    new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in review: it was refused for good, though classes can be deleted."""
    monkeypatch.setattr("kshot_serve.models.champions._LIMITS_S", 0.1)
    shop.sell(bundles[0])
    too_large = True

    async def on_change(champion: Champion) -> None:
        if champion.version == "2" and too_large:
            raise Problem("not_supported", "a label space has 300 classes", reason="limits")

    async def body() -> None:
        nonlocal too_large
        world = new_world(shop.source, tmp_path, shop.address)
        world.champions.on_change = on_change
        async with world:
            await asyncio.to_thread(shop.sell, bundles[1])
            await world.champions.follow()
            assert world.version == "1"
            too_large = False
            await asyncio.sleep(0.1)
            await world.champions.follow()
            assert world.version == "2"

    run(body())


def test_a_first_bundle_that_cannot_serve_ends_the_start_with_the_reason(
    new_world: World, shop: Shop, bundles: list[Path], remake: Remake, tmp_path: Path
) -> None:
    not_finite(bundles[0], shop, remake, tmp_path)
    with pytest.raises(KshotError, match="not finite"):
        run(new_world(shop.source, tmp_path, shop.address).__aenter__())  # type: ignore[arg-type]


def test_after_a_restart_the_last_good_one_serves_in_place_of_a_refused_one(
    new_world: World, shop: Shop, bundles: list[Path], remake: Remake, tmp_path: Path
) -> None:
    shop.sell(bundles[0])

    async def serve(why: str | None) -> None:
        async with new_world(shop.source, tmp_path / "serve", shop.address) as world:
            await world.champions.follow()
            assert world.version == "1"
            assert world.champions.degraded == why

    run(serve(None))
    not_finite(bundles[1], shop, remake, tmp_path)
    run(serve("version 2 was refused: its files or its graphs fail a check; version 1 serves"))


# When the registry is away, or has nothing ------------------------------------------------------------------------


def test_a_server_waits_for_the_first_champion(
    new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path
) -> None:
    async def body() -> None:
        async with new_world(shop.source, tmp_path, shop.address) as world:
            assert not world.champions.ready
            degraded = "the registry names no version, or does not answer; no model serves yet"
            assert world.champions.degraded == degraded
            await asyncio.to_thread(shop.sell, bundles[0])
            await world.champions.follow()
            assert world.champions.ready

    run(body())


def test_the_last_good_bundle_serves_while_the_registry_is_away(
    new_world: World,
    new_shop: Any,
    mlflow_server: Any,
    bundles: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Product M26: the server keeps serving, starts without its registry, says so, and recovers by itself."""
    for name, value in {"MAX_RETRIES": "0", "TIMEOUT": "5"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    shop = new_shop(mlflow_server.address, "toy")
    shop.sell(bundles[0])
    away = "the registry names no version, or does not answer; version 1 serves"

    async def body() -> None:
        async with new_world(shop.source, tmp_path / "serve", shop.address) as world:
            assert (world.version, world.champions.degraded, world.metric("kshot_degraded")) == ("1", None, 0)
            await asyncio.to_thread(mlflow_server.stop)
            await world.champions.follow()
            assert world.champions.ready
            assert (world.champions.degraded, world.metric("kshot_degraded")) == (away, 1)
            await world.sound()
        world = new_world(shop.source, tmp_path / "serve", shop.address)
        changes = []

        async def on_change(champion: Champion) -> None:
            changes.append(champion.version)

        world.champions.on_change = on_change
        async with world:  # a start without it
            assert world.champions.ready
            await world.champions.follow()
            assert (world.champions.degraded, world.metric("kshot_degraded")) == (away, 1)
            await world.sound()
            await asyncio.to_thread(mlflow_server.start)
            await world.champions.follow()
            assert (world.champions.degraded, world.metric("kshot_degraded")) == (None, 0)
            assert changes == ["1"]  # it was the right one all along
            await asyncio.to_thread(shop.sell, bundles[1])
            await world.champions.follow()
            assert world.version == "2"
            await world.sound()

    run(body())


# What it asks of its host -----------------------------------------------------------------------------------------


def test_neither_torch_nor_mlflow_is_loaded_by_a_server_of_a_path(features_bundle: Path, tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from pathlib import Path
from kshot_serve.models.champions import Champions
from kshot_serve.inference.engine import Engine
from kshot_serve.settings import Settings
from kshot_serve.observe.metrics import Metrics

async def main():
    settings = Settings(source={str(features_bundle)!r}, folder=Path({str(tmp_path)!r}))
    engine = Engine(settings.engine, Metrics())
    await engine.start()
    champions = Champions(settings, engine.open, Metrics())
    await champions.start()
    assert champions.ready
    await champions.stop()
    await engine.stop()

asyncio.run(main())
assert not {{"torch", "mlflow", "kshot", "prefect", "dvc"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)
