"""Versions that are refused while the old one stays."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from kshot_runtime.errors import KshotError
from kshot_serve.errors import Problem
from kshot_serve.models.champion import Champion

World = Callable[..., Any]
Shop = Any
Remake = Callable[[Path, Path, Callable[[onnx.GraphProto], None]], Path]


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
            assert world.metric("kshot_degraded") == 1
            assert sum("version 2 was refused" in record.getMessage() for record in caplog.records) == 1
            await asyncio.to_thread(shop.sell, bundles[2])
            await world.champions.follow()
            assert world.version == "3"
            assert world.champions.degraded is None
            assert world.metric("kshot_degraded") == 0

    asyncio.run(body())


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

    asyncio.run(body())


def test_a_champion_that_label_spaces_were_too_large_for_is_tried_again_later(
    new_world: World, shop: Shop, bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in review: it was refused for good, though classes can be deleted."""
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
            too_large, refused = False, time.monotonic()
            for minutes, serves in ((4, "1"), (5, "2")):
                later = refused + 60 * minutes
                monkeypatch.setattr("kshot_serve.models.champions.monotonic", lambda now=later: now)
                await world.champions.follow()
                assert world.version == serves

    asyncio.run(body())


def test_a_first_bundle_that_cannot_serve_ends_the_start_with_the_reason(
    new_world: World, shop: Shop, bundles: list[Path], remake: Remake, tmp_path: Path
) -> None:
    not_finite(bundles[0], shop, remake, tmp_path)
    with pytest.raises(KshotError, match="not finite"):
        asyncio.run(new_world(shop.source, tmp_path, shop.address).__aenter__())


def test_after_a_restart_the_last_good_one_serves_in_place_of_a_refused_one(
    new_world: World, shop: Shop, bundles: list[Path], remake: Remake, tmp_path: Path
) -> None:
    shop.sell(bundles[0])

    async def serve(why: str | None) -> None:
        async with new_world(shop.source, tmp_path / "serve", shop.address) as world:
            await world.champions.follow()
            assert world.version == "1"
            assert world.champions.degraded == why

    asyncio.run(serve(None))
    not_finite(bundles[1], shop, remake, tmp_path)
    asyncio.run(serve("version 2 was refused: its files or its graphs fail a check; version 1 serves"))
