"""What takes seconds and is made once: two tiny bundles, one that takes features and one that takes images; servers."""

from __future__ import annotations

import io
import json
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import torch
from filelock import FileLock
from PIL import Image

from kshot.data.datasets import ClassImages
from kshot.data.episodes import Shape
from kshot.evaluation.calibration import calibrate
from kshot.evaluation.verification import verification
from kshot.export import export
from kshot.learner import Learner
from kshot.training import Training, meta_train
from kshot_plugins.conv4 import Conv4
from kshot_plugins.maml import MAML
from kshot_plugins.protonet import ProtoNet
from kshot_runtime import manifest as manifests
from kshot_runtime.images import ImageRule, decode
from kshot_serve.backend import Backend
from kshot_serve.inference.engine import Engine
from kshot_serve.models.champions import Champions
from kshot_serve.observe.metrics import Metrics
from kshot_serve.server.run import Server
from kshot_serve.settings import EngineSettings, Settings
from kshot_serve.spaces.questions import Answer
from kshot_serve.spaces.service import Spaces
from kshot_serve.spaces.uploads import Upload
from kshot_serve.storage.store import Store

SIDE = 16
COLOURS = {
    "red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230), "yellow": (230, 230, 20),
    "white": (240, 240, 240), "black": (10, 10, 10), "grey": (128, 128, 128),
}  # fmt: skip


def _photo(colour: str, shade: int = 0, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    random, (width, height) = np.random.default_rng(shade), size
    pixels = np.clip(np.array(COLOURS[colour]) + random.normal(0, 12, (height, width, 3)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def photo() -> Callable[..., bytes]:
    """photo(colour, shade=0, kind="PNG", size=(40, 30)): a noisy photo of one colour; each shade is another file."""
    return _photo


@pytest.fixture(scope="session")
def test_names() -> set[str]:
    """Of all tests of this project."""
    return {
        name
        for file in Path(__file__).parents[1].rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M)
    }


def _build(folder: Path, kind: type[Learner], training_steps: int, **settings: object) -> Path:
    random = np.random.default_rng(0)
    plain = random.integers(0, 256, (64, 1, 3, 1, 1)) + random.normal(0, 12, (64, 8, 3, SIDE, SIDE))
    images = ClassImages.from_arrays(list(np.clip(plain, 0, 255).astype(np.uint8)))  # 64 colours, 8 images of each
    torch.manual_seed(0)
    config = kind.Config(**settings)
    learner = kind(Conv4((3, SIDE, SIDE), Conv4.Config(width=8, norm="running")), config)
    training = Training(
        queries=3, steps=training_steps, lr=1e-2, validate_every=100, validation_episodes=2, validation_queries=3
    )
    list(meta_train(learner, images, images, training, folder=folder.with_name(f"{folder.name}-training"), seed=0))
    learner.eval()
    trials = [(learner, images)]
    fits = [calibrate(trials, Shape(5, shots, 3), 10, seed=1, by="logit") for shots in (1, 5)]
    facts = manifests.Facts(
        learner=manifests.Plugin(name=learner.name),
        backbone=manifests.Plugin(name="conv4"),
        image=ImageRule(size=SIDE, channels=3),
        limits=manifests.Limits(ways=200, shots=100, support=2000),
        calibration=tuple(
            manifests.Calibration(
                ways=fit.shape.ways, shots=fit.shape.shots,
                **{name: value for name, value in asdict(fit).items() if name in manifests.Calibration.model_fields},
            )
            for fit in fits
        ),
        verification=manifests.Verification(**asdict(verification(trials, 40, seed=1))),
    )  # fmt: skip
    export(learner, folder, facts=facts, data=images, shape=Shape(3, 1, 3), seed=1, episodes=5)
    return folder


def _shared(factory: pytest.TempPathFactory, kind: type[Learner], training_steps: int, **settings: object) -> Path:
    """A bundle that the first of pytest-xdist's workers to need it builds, for all of them."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / f"bundle-{kind.name}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _build(folder.with_name(f"{folder.name}-unfinished"), kind, training_steps, **settings).rename(folder)
    return folder


@pytest.fixture(scope="session")
def features_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ProtoNet that has learnt for a second to tell colours apart. It takes features."""
    return _shared(tmp_path_factory, ProtoNet, training_steps=60)


@pytest.fixture(scope="session")
def images_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MAML that has learnt for two seconds to tell colours apart, in two inner steps. It takes images."""
    return _shared(tmp_path_factory, MAML, training_steps=100, steps=2)


@pytest.fixture(scope="session")
def remake() -> Callable[[Path, Path, Callable[[onnx.GraphProto], None]], Path]:
    """remake(bundle, folder, change): a bundle around another embed.onnx, with right hashes.

    `change` gets the graph, which gives `plain` where it gave `features`, and is to make features of it.
    """

    def made(bundle: Path, folder: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
        shutil.copytree(bundle, folder)
        model = onnx.load(folder / "embed.onnx")
        for node in model.graph.node:
            node.output[:] = ["plain" if name == "features" else name for name in node.output]
            node.input[:] = ["plain" if name == "features" else name for name in node.input]
        change(model.graph)
        onnx.save(model, folder / "embed.onnx")
        content = json.loads((folder / "bundle.json").read_text())
        content["files"]["embed.onnx"] = manifests.FileFacts.of((folder / "embed.onnx").read_bytes()).model_dump()
        (folder / "bundle.json").write_text(json.dumps(content))
        return folder

    return made


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """until(condition, seconds=60): wait for it."""

    def wait(condition: Callable[[], object], seconds: float = 60) -> None:
        given_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < given_up, "what was waited for did not come"
            time.sleep(0.01)

    return wait


@dataclass
class Running:
    """A server in a thread of this process, on a real socket."""

    url: str
    backend: Backend
    server: Server
    http: httpx.Client

    def metric(self, name: str, headers: dict[str, str] | None = None) -> float:
        """The sum of the samples whose lines begin so."""
        lines = self.http.get("/metrics", headers=headers).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextmanager
def _running(settings: Settings) -> Iterator[Running]:
    told: queue.Queue[str | BaseException] = queue.Queue()
    server = Server(settings, told.put)

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        line = told.get(timeout=60)
        if isinstance(line, BaseException):
            raise line
        url = line.rsplit(" ", 1)[1]
        with httpx.Client(base_url=url, timeout=60) as http:
            yield Running(url, server.backend, server, http)
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="session")
def running() -> Callable[[Settings], AbstractContextManager[Running]]:
    """running(settings): a context with a server that is ready; `url`, `http` and `backend` lead to it."""
    return _running


@pytest.fixture(scope="session")
def server(features_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests that only ask it things; each makes label spaces of its own."""
    folder = tmp_path_factory.mktemp("serve")
    with _running(Settings(source=str(features_bundle), folder=folder, port=0, leave_s=0)) as started:
        yield started


@dataclass
class Parts:
    """Label spaces on a real engine and a real champion, without HTTP."""

    spaces: Spaces
    store: Store
    engine: Engine
    champions: Champions
    metrics: Metrics

    def upload(self, content: bytes) -> Upload:
        rule = self.champions.current.bundle.manifest.image
        return Upload(content, decode(content, rule), rule)

    async def a_space(self, *colours: str, shots: int = 2, name: str = "colours") -> str:
        """The id of a new label space with a class of each colour."""
        space = await self.spaces.create(name)
        for colour in colours:
            await self.spaces.add_class(space.id, colour, [self.upload(_photo(colour, i)) for i in range(shots)])
        return space.id

    async def ask(self, space: str, *photos: bytes) -> tuple[Answer, ...]:
        """What the label space answers, one for each photo."""
        uploads = [self.upload(each) for each in photos]
        return (await self.spaces.classify(space, uploads, time.monotonic() + 30)).answers

    async def ids(self, space: str) -> dict[str, str]:
        """The ids of the classes, by their names."""
        return {each.name: each.id for each in (await self.spaces.classes(space))[1]}


@asynccontextmanager
async def _parts(bundle: Path, folder: Path, **settings: Any) -> AsyncIterator[Parts]:
    chosen = Settings(source=str(bundle), folder=folder, engine=EngineSettings(threads=1, runners=1), **settings)
    metrics = Metrics()
    engine = Engine(chosen.engine, metrics)
    champions = Champions(chosen, engine.open, metrics)
    store = Store(chosen.database_url, metrics=metrics)
    spaces = Spaces(store, engine, champions, chosen, metrics)
    await engine.start()
    try:
        await spaces.start()
        await champions.start()
        yield Parts(spaces, store, engine, champions, metrics)
    finally:
        await champions.stop()
        await engine.stop()
        store.close()


@pytest.fixture(scope="session")
def parts() -> Callable[..., AbstractAsyncContextManager[Parts]]:
    """parts(bundle, folder, **settings): an asynchronous context with label spaces in that folder."""
    return _parts
