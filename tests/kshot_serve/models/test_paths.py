"""A server of a bundle by its path."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from kshot_runtime.errors import KshotError
from kshot_serve.errors import Problem
from kshot_serve.models.champion import Champion

World = Callable[..., Any]


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

    asyncio.run(body())


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

    asyncio.run(body())


def test_a_path_without_a_bundle_ends_the_start_with_the_reason(new_world: World, tmp_path: Path) -> None:
    with pytest.raises(KshotError, match="there is no bundle at"):
        asyncio.run(new_world(str(tmp_path / "nowhere"), tmp_path).__aenter__())


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_gpu_where_there_is_none_ends_the_start_with_the_reason(
    new_world: World, features_bundle: Path, tmp_path: Path, device: str
) -> None:
    """gh:microsoft/onnxruntime#23372, #17801: it ran on the CPU, and said nothing."""
    try:
        onnxruntime.InferenceSession(features_bundle / "embed.onnx", providers=["CUDAExecutionProvider"])
    except Exception:
        pass
    else:
        if Path("/dev/nvidia0").exists():
            pytest.skip("this machine has a GPU")
    with pytest.raises(KshotError, match=f"{device} was asked for, but"):
        asyncio.run(new_world(str(features_bundle), tmp_path, engine={"device": device}).__aenter__())


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
