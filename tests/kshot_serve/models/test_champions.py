"""Champions come and go, and whoever is served does not notice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kshot_runtime.manifest import FileFacts
from kshot_serve.models.champion import Champion
from kshot_serve.settings import Settings

World = Callable[..., Any]
Shop = Any
SIDE = 16


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, SIDE, SIDE), np.uint8)


def test_a_new_champion_takes_over_by_itself(new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path) -> None:
    shop.sell(bundles[0])
    assert Settings.model_fields["poll_s"].default == 10

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

    asyncio.run(body())


def test_a_fixed_version_stays(new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path) -> None:
    for bundle in bundles[:2]:
        shop.sell(bundle)

    async def body() -> None:
        async with new_world(f"models:/{shop.name}/1", tmp_path, shop.address) as world:
            await world.champions.follow()
            assert world.version == "1"

    asyncio.run(body())


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

    asyncio.run(body())
    assert set(served) == {"1", "2", "3", "4"}


def test_the_last_two_bundles_stay_on_disk(new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path) -> None:
    shop.sell(bundles[0])

    async def body() -> None:
        async with new_world(shop.source, tmp_path, shop.address) as world:
            for bundle in bundles[1:]:
                await asyncio.to_thread(shop.sell, bundle)
                await world.champions.follow()

    asyncio.run(body())
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

    asyncio.run(body())


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

    asyncio.run(once())
    (folder,) = (path for path in (tmp_path / "champions").iterdir() if path.is_dir())
    (tmp_path / "champions" / ".incoming-abc").mkdir()
    (folder / "embed.onnx").write_bytes(b"half")
    asyncio.run(once())
    assert {path.name for path in (tmp_path / "champions").iterdir()} == {folder.name, "last.json"}


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

    asyncio.run(body())


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

    asyncio.run(body())
