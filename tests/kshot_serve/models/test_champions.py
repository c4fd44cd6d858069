"""Champions come and go, and whoever is served does not notice."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from kshot_flows import registry
from kshot_flows.tracking import runs, stores
from kshot_runtime.errors import KshotError
from kshot_runtime.manifest import FileFacts
from kshot_serve.errors import Problem
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champion import Champion
from kshot_serve.models.champions import Champions
from kshot_serve.models.registry import Found, Registry
from kshot_serve.models.shelf import Shelf
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import Settings

Remake = Callable[[Path, Path, Callable[[onnx.GraphProto], None]], Path]

SIDE = 16
MLFLOW = Path(__file__).parents[3] / "mlflow"


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, SIDE, SIDE), np.uint8)


def times(factor: float) -> Callable[[onnx.GraphProto], None]:
    """Features so many times as large: another model, told apart by what it gives."""

    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), "factor"))
        graph.node.append(helper.make_node("Mul", ["plain", "factor"], ["features"]))

    return change


class World:
    """A server's champions and engine, as the application has them."""

    def __init__(self, source: str, folder: Path, address: str = "", **settings: Any) -> None:
        self.metrics = Metrics()
        self.settings = Settings(
            source=source, folder=folder, registry=address, **{"poll_s": 3600, "engine": {"threads": 1}} | settings
        )
        self.engine = Engine(self.settings.engine, self.metrics)
        self.champions = Champions(self.settings, self.engine.open, self.metrics)

    async def __aenter__(self) -> World:
        await self.engine.start()
        try:
            await self.champions.start()
        except BaseException:
            await self.engine.stop()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.champions.stop()
        await self.engine.stop()

    def metric(self, name: str, /, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    @property
    def version(self) -> str:
        return self.champions.current.version

    async def sound(self) -> None:
        """The champion answers."""
        champion = self.champions.current
        assert (await self.engine.embed(champion, images(2))).shape == (2, champion.bundle.manifest.features)


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 120))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a real SQLite registry. Tests keep apart by the names of their models."""
    home = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("KSHOT_HOME", str(home))
        stores.uri()
    return home


class Shop:
    """Registers bundles and promotes them, by the commands' own functions."""

    def __init__(self, address: str, name: str) -> None:
        self.address, self.name, self.source = address, name, f"models:/{name}@production"

    def register(self, bundle: Path) -> int:
        with runs.run(self.name, recipe={"lr": 0.1}, data=runs.DataRef("toy", "f" * 64), seed=1) as made:
            return registry.register(self.name, made.id, bundle)

    def promote(self, version: int) -> None:
        registry.move(self.name, version, "production", why="test")

    def sell(self, bundle: Path) -> str:
        self.promote(version := self.register(bundle))
        return str(version)

    def artifacts(self, version: int) -> Path:
        """Where the store keeps the files of a version."""
        found = stores.client().get_model_version(self.name, str(version))
        return Path(found.source.removeprefix("file://"))


@pytest.fixture
def shop(store: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Shop:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("KSHOT_HOME", str(store))
    monkeypatch.setenv("KSHOT_USER", "ann")
    return Shop(f"sqlite:///{store / 'mlflow' / 'mlflow.db'}", f"toy-{abs(hash(request.node.nodeid))}")


@pytest.fixture(scope="session")
def bundles(features_bundle: Path, remake: Remake, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four models: the features of the second are twice those of the first, and so on."""
    folder = tmp_path_factory.mktemp("champions")
    return [features_bundle] + [remake(features_bundle, folder / str(n), times(n)) for n in (2, 3, 4)]


# A bundle by its path ---------------------------------------------------------------------------------------------


def test_a_bundle_serves_from_a_folder_and_from_a_zip(features_bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for file in features_bundle.iterdir():
            archive.write(file, file.name)

    async def body() -> None:
        for source in (features_bundle, tmp_path / "model.zip"):
            async with World(str(source), tmp_path) as world:
                champion = world.champions.current
                assert (champion.version, champion.id) == ("0", champion.bundle.manifest.id)
                assert champion.name == source.stem
                await world.sound()

    run(body())


def test_ready_means_loaded_and_warm_and_not_stopping(features_bundle: Path, tmp_path: Path) -> None:
    """gh:triton-inference-server/server#6939, #7588: ready, and yet the model cannot be used."""

    async def body() -> None:
        world = World(str(features_bundle), tmp_path)
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


def test_a_path_without_a_bundle_ends_the_start_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(KshotError, match="there is no bundle at"):
        run(World(str(tmp_path / "nowhere"), tmp_path).__aenter__())  # type: ignore[arg-type]


def test_cuda_where_there_is_none_ends_the_start_with_the_reason(features_bundle: Path, tmp_path: Path) -> None:
    """gh:microsoft/onnxruntime#23372, #17801: it ran on the CPU, and said nothing."""
    try:
        onnxruntime.InferenceSession(features_bundle / "embed.onnx", providers=["CUDAExecutionProvider"])
    except Exception:
        pass
    else:
        if Path("/dev/nvidia0").exists():
            pytest.skip("this machine has a GPU")
    with pytest.raises(KshotError, match="cuda was asked for, but"):
        run(World(str(features_bundle), tmp_path, engine={"device": "cuda"}).__aenter__())  # type: ignore[arg-type]


# Following a registry ---------------------------------------------------------------------------------------------


def test_a_new_champion_takes_over_by_itself(shop: Shop, bundles: list[Path], tmp_path: Path) -> None:
    shop.sell(bundles[0])

    async def body() -> None:
        world = World(shop.source, tmp_path, shop.address, poll_s=0.05)
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
            assert world.metric("kshot_champion_swaps_total", outcome="taken") == 2
            labels = {"name": shop.name, "version": "2", "bundle": world.champions.current.id}
            assert world.metric("kshot_champion", **labels) == 1
            assert world.champions.degraded is None

    run(body())


def test_a_fixed_version_stays(shop: Shop, bundles: list[Path], tmp_path: Path) -> None:
    for bundle in bundles[:2]:
        shop.sell(bundle)

    async def body() -> None:
        async with World(f"models:/{shop.name}/1", tmp_path, shop.address) as world:
            await world.champions.follow()
            assert world.version == "1"

    run(body())


def test_no_request_fails_while_champions_change(shop: Shop, bundles: list[Path], tmp_path: Path) -> None:
    """gh:triton-inference-server/server#5042: requests failed while a model was loaded."""
    shop.sell(bundles[0])
    factors = {"1": 1, "2": 2, "3": 3, "4": 4}
    photos = images(8)
    served: list[str] = []

    async def body() -> None:
        async with World(shop.source, tmp_path, shop.address) as world:
            expected = await world.engine.embed(world.champions.current, photos)

            async def client(number: int) -> None:
                while not over.is_set():
                    champion = world.champions.current
                    found = await world.engine.embed(champion, photos[number : number + 1], time.monotonic() + 30)
                    wanted = factors[champion.version] * expected[number : number + 1]
                    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
                    served.append(champion.version)

            over = asyncio.Event()
            clients = [asyncio.create_task(client(number)) for number in range(8)]
            for bundle in bundles[1:]:
                await asyncio.to_thread(shop.sell, bundle)
                await world.champions.follow()
            for version in (1, 2, 3, 4):
                await asyncio.to_thread(shop.promote, version)
                await world.champions.follow()
                assert world.version == str(version)
            over.set()
            await asyncio.gather(*clients)

    run(body())
    assert set(served) == {"1", "2", "3", "4"}


def test_the_last_two_bundles_stay_on_disk(shop: Shop, bundles: list[Path], tmp_path: Path) -> None:
    shop.sell(bundles[0])

    async def body() -> None:
        async with World(shop.source, tmp_path, shop.address) as world:
            for bundle in bundles[1:]:
                await asyncio.to_thread(shop.sell, bundle)
                await world.champions.follow()

    run(body())
    kept = {FileFacts.of((bundle / "bundle.json").read_bytes()).sha256[:16] for bundle in bundles[2:]}
    assert {path.name for path in (tmp_path / "champions").iterdir() if path.is_dir()} == kept


def test_workers_that_fetch_at_once_share_a_shelf(shop: Shop, bundles: list[Path], tmp_path: Path) -> None:
    """Each asks the registry by itself; none takes from the shelf what another stands on."""

    async def body() -> None:
        shop.sell(bundles[0])
        folder, worlds = tmp_path / "serve", []
        async with AsyncExitStack() as stack:
            for _ in range(3):
                worlds.append(await stack.enter_async_context(World(shop.source, folder, shop.address)))
            for bundle in bundles[1:]:
                before = {path for path in (folder / "champions").iterdir() if path.is_dir()}
                version = shop.sell(bundle)
                await asyncio.gather(*[world.champions.follow() for world in worlds])
                assert [(world.version, world.champions.degraded) for world in worlds] == [(version, None)] * 3
                kept = {path for path in (folder / "champions").iterdir() if path.is_dir()}
                assert len(kept) == 2
                assert len(kept & before) == 1  # the one before, which serves if this one is refused after a restart

    run(body())


def test_a_worker_that_was_slower_takes_what_another_fetched(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in review: it removed the folder, which the other had just begun to read, to put its own there."""
    sha256, rename, shelf = (
        FileFacts.of((bundles[0] / "bundle.json").read_bytes()).sha256,
        os.rename,
        tmp_path / "shelf",
    )

    class Copies:
        def download(self, found: Found, folder: Path) -> Path:
            return Path(shutil.copytree(bundles[0], folder / "bundle"))

    def after_another(came: Path, there: Path) -> None:
        if not there.exists():
            shutil.copytree(bundles[0], there)
            (there / "whose").write_text("the other's")
        rename(came, there)

    monkeypatch.setattr("kshot_serve.models.shelf.os.rename", after_another)
    folder = Shelf(shelf).fetch(Copies(), Found("toy", "1", "", sha256))  # type: ignore[arg-type]
    assert (folder / "whose").read_text() == "the other's"
    assert [path.name for path in shelf.iterdir()] == [sha256[:16]]


def test_what_others_that_live_are_fetching_is_left_alone(tmp_path: Path) -> None:
    """Seen in review: a worker that took the place of a dead one removed what its fellows were downloading."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as alive:  # it ends with the block
        dead = subprocess.Popen(["true"])
        dead.wait()
        for pid in (dead.pid, os.getpid(), alive.pid):
            (tmp_path / f".incoming-{pid}-x").mkdir()
            (tmp_path / f".incoming-{pid}-last.json").touch()
        Shelf(tmp_path).tidy()
    left = {f".incoming-{alive.pid}-x", f".incoming-{alive.pid}-last.json"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_what_a_killed_server_had_begun_to_fetch_is_removed_and_a_damaged_copy_fetched_again(
    shop: Shop, bundles: list[Path], tmp_path: Path
) -> None:
    shop.sell(bundles[0])

    async def once() -> None:
        async with World(shop.source, tmp_path, shop.address) as world:
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
    shop.sell(remake(bundle, folder / "not finite", times(float("nan"))))


def of_tomorrow(bundle: Path, shop: Shop, remake: Remake, folder: Path) -> None:
    """The manifest follows another schema."""
    made = shutil.copytree(bundle, folder / "tomorrow")
    (made / "bundle.json").write_text(
        json.dumps(json.loads((made / "bundle.json").read_text()) | {"schema_version": 9})
    )
    shop.sell(made)


@pytest.mark.parametrize("sell", [changed, renamed, outside, not_finite, of_tomorrow])
def test_a_bundle_that_fails_its_checks_is_refused_and_the_old_one_stays(
    shop: Shop, bundles: list[Path], remake: Remake, tmp_path: Path, sell: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """CVE-2022-25882, CVE-2024-27318, CVE-2025-51480: external data; gh:pytorch/pytorch#169178: a wrong export."""
    shop.sell(bundles[0])
    changes = []

    async def on_change(champion: Champion) -> None:
        changes.append(champion.version)

    async def body() -> None:
        world = World(shop.source, tmp_path / "serve", shop.address)
        world.champions.on_change = on_change
        async with world:
            await asyncio.to_thread(sell, bundles[1], shop, remake, tmp_path)
            for _ in range(3):
                await world.champions.follow()
            assert changes == ["1"]
            assert world.version == "1"
            assert world.champions.ready
            await world.sound()
            assert world.metric("kshot_champion_swaps_total", outcome="refused") == 1  # and not tried again
            assert world.champions.degraded == "version 2 was refused; version 1 serves"
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
    shop: Shop, bundles: list[Path], tmp_path: Path, error: Exception, tries: int
) -> None:
    shop.sell(bundles[0])
    tried = []

    async def on_change(champion: Champion) -> None:
        tried.append(champion.version)
        if champion.version == "2":
            raise error

    async def body() -> None:
        world = World(shop.source, tmp_path, shop.address)
        world.champions.on_change = on_change
        async with world:
            await asyncio.to_thread(shop.sell, bundles[1])
            for _ in range(3):
                await world.champions.follow()
            assert tried == ["1"] + ["2"] * tries
            assert world.version == "1"

    run(body())


def test_a_champion_that_label_spaces_were_too_large_for_is_tried_again_later(
    shop: Shop, bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        world = World(shop.source, tmp_path, shop.address)
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
    shop: Shop, bundles: list[Path], remake: Remake, tmp_path: Path
) -> None:
    not_finite(bundles[0], shop, remake, tmp_path)
    with pytest.raises(KshotError, match="not finite"):
        run(World(shop.source, tmp_path, shop.address).__aenter__())  # type: ignore[arg-type]


def test_after_a_restart_the_last_good_one_serves_in_place_of_a_refused_one(
    shop: Shop, bundles: list[Path], remake: Remake, tmp_path: Path
) -> None:
    shop.sell(bundles[0])

    async def serve(why: str | None) -> None:
        async with World(shop.source, tmp_path / "serve", shop.address) as world:
            assert world.version == "1"
            assert world.champions.degraded == why

    run(serve(None))
    not_finite(bundles[1], shop, remake, tmp_path)
    run(serve("version 2 was refused; version 1 serves"))


# When the registry is away, or has nothing ------------------------------------------------------------------------


def test_a_server_waits_for_the_first_champion(shop: Shop, bundles: list[Path], tmp_path: Path) -> None:
    async def body() -> None:
        async with World(shop.source, tmp_path, shop.address) as world:
            assert not world.champions.ready
            degraded = "the registry names no version, or does not answer; no model serves yet"
            assert world.champions.degraded == degraded
            await asyncio.to_thread(shop.sell, bundles[0])
            await world.champions.follow()
            assert world.champions.ready

    run(body())


class Server:
    """A real MLflow server with the project's settings, that can be stopped and started again."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.home, self.address = home, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        lines = (MLFLOW / "server.env").read_text().splitlines()
        settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
        environment = {**os.environ, **settings, "MLFLOW_PORT": str(self.port)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.home / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server"],
                env=environment, cwd=self.home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        for _ in range(240):
            assert self.process.poll() is None, (self.home / "server.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.25)

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGTERM)  # its workers too
            self.process.wait(timeout=30)
            self.process = None


@pytest.fixture
def server(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "mlflow" / "server").mkdir(parents=True)
    shutil.copy(store / "mlflow" / "mlflow.db", tmp_path / "mlflow" / "server")  # saves making its tables
    server = Server(tmp_path)
    try:
        server.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        yield server
    finally:
        server.stop()


def test_the_last_good_bundle_serves_while_the_registry_is_away(
    server: Server, bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Product M26: the server keeps serving, starts without its registry, says so, and recovers by itself."""
    for name, value in {"MAX_RETRIES": "0", "TIMEOUT": "5"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    shop = Shop(server.address, "toy")
    shop.sell(bundles[0])
    away = "the registry names no version, or does not answer; version 1 serves"

    async def body() -> None:
        async with World(shop.source, tmp_path / "serve", shop.address) as world:
            assert (world.version, world.champions.degraded, world.metric("kshot_degraded")) == ("1", None, 0)
            await asyncio.to_thread(server.stop)
            await world.champions.follow()
            assert world.champions.ready
            assert (world.champions.degraded, world.metric("kshot_degraded")) == (away, 1)
            await world.sound()
        world = World(shop.source, tmp_path / "serve", shop.address)
        changes = []

        async def on_change(champion: Champion) -> None:
            changes.append(champion.version)

        world.champions.on_change = on_change
        async with world:  # a start without it
            assert world.champions.ready
            assert (world.champions.degraded, world.metric("kshot_degraded")) == (away, 1)
            await world.sound()
            await asyncio.to_thread(server.start)
            await world.champions.follow()
            assert (world.champions.degraded, world.metric("kshot_degraded")) == (None, 0)
            assert changes == ["1"]  # it was the right one all along
            await asyncio.to_thread(shop.sell, bundles[1])
            await world.champions.follow()
            assert world.version == "2"
            await world.sound()

    run(body())


# What it asks of its host -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["models:/toy", "models:/@production", "models:/toy@", "models:/toy/latest"])
def test_a_source_that_names_no_model_is_told_what_would(source: str) -> None:
    with pytest.raises(KshotError, match="models:/NAME@ALIAS follows one"):
        Registry(source, "sqlite://")


def test_without_an_address_of_a_registry_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(KshotError, match="set MLFLOW_TRACKING_URI"):
        Registry("models:/toy@production")


def test_without_a_project_to_follow_the_command_says_what_is_missing_and_makes_none(tmp_path: Path) -> None:
    """Seen in review: an empty store was made and waited on; without all of MLflow there was a traceback."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [Path(sys.executable).with_name("kshot"), "serve", "models:/toy@production", "--port", "0"],
        env=environment | {"KSHOT_HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "set MLFLOW_TRACKING_URI to its address" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "mlflow").exists()


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
