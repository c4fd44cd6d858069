"""Shared code of the server benchmarks: a bundle, photos, a `kshot serve` process, and lightweight clients."""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from onnx_vs_torch import machine
from PIL import Image

from kshot.data.datasets import ClassImages
from kshot.data.episodes import Shape
from kshot.export import Facts, export
from kshot.recipe import LearnerSettings, PluginSettings, Recipe
from kshot_client import Client
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import Plugin

RESULTS = Path(__file__).parent / "results"
BACKBONES: dict[str, dict[str, Any]] = {"protonet": {}, "maml": {"downsample": "stride", "norm": "group"}}
LEARNERS: dict[str, dict[str, Any]] = {"protonet": {}, "maml": {"steps": 2}}  # as in Omniglot's recipes


def build(
    name: str,
    folder: Path,
    *,
    size: int = 28,
    channels: int = 1,
    width: int = 64,
    backbone: str = "conv4",
    **settings: Any,
) -> Path:
    """A bundle of an untrained learner on conv4, or on another backbone; weights do not affect the time."""
    torch.manual_seed(0)
    image = (channels, size, size)
    on = (
        PluginSettings(name="conv4", width=width, **BACKBONES[name])
        if backbone == "conv4"
        else PluginSettings(name=backbone)
    )
    recipe = Recipe(
        name="bench",
        dataset={"name": "noise"},
        backbone=on,
        learner=LearnerSettings(name=name, **(LEARNERS[name] | settings)),
    )
    random = np.random.default_rng(0)
    noise = ClassImages.from_arrays([random.integers(0, 256, (4, *image), np.uint8) for _ in range(6)])
    facts = Facts(
        learner=Plugin(name=name), backbone=Plugin(name=backbone), image=ImageRule(size=size, channels=channels)
    )
    export(recipe.build(image).eval(), folder, facts=facts, data=noise, shape=Shape(3, 1, 2), seed=1, episodes=10)
    return folder


def photo(of: int, shade: int = 0, *, size: int = 28, channels: int = 1, kind: str = "PNG") -> bytes:
    """A synthetic photo: the object's pattern of coarse blocks, with noise that depends on the shot."""
    thing, shot = np.random.default_rng(of), np.random.default_rng((of, shade))
    blocks = np.kron(thing.integers(0, 256, (4, 4, channels)), np.ones((-(-size // 4), -(-size // 4), 1)))
    pixels = np.clip(blocks[:size, :size] + shot.normal(0, 12, (size, size, channels)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, kind)
    return file.getvalue()


# The server --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A server in a separate process."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self) -> Client:
        return Client(self.url)

    def memory(self) -> float:
        """Resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1000

    def processor(self) -> float:
        """CPU seconds used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """SIGKILL the server and its workers."""
        for each in family(self.process.pid):
            os.kill(each, signal.SIGKILL)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


def family(pid: int) -> dict[int, float]:
    """A process and its living descendants, with the CPU seconds of each."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        used[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    found, grown = {pid}, True
    while grown:
        more = {each for each, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return {each: used[each] for each in found if each in used}


@contextmanager
def serving(
    source: str | Path, folder: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Run `kshot serve` on a free local port with its state in this folder, for the block."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        str(Path(sys.executable).with_name("kshot")),
        "serve",
        str(source),
        "--port",
        "0",
        "--folder",
        str(folder),
    ]
    log = folder / "log"
    with log.open("a") as errors:
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | (environment or {})
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("kshot serves"):
            process.wait(10)
            raise SystemExit(f"the server did not start:\n{log.read_text()[-2000:]}")
        yield Served(line.split()[-1], process, log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def fill(client: Client, classes: int, photos: Callable[[int, int], bytes], shots: int = 5, name: str = "bench") -> str:
    """Create a label space with this number of classes; its id. `photos(thing, shade)` makes the photos."""
    space = client.call("POST", "/v1/spaces", json={"name": name}).json()["id"]
    for thing in range(classes):
        add(client, space, f"thing {thing}", [photos(thing, shade) for shade in range(shots)])
    return space


def add(client: Client, space: str, name: str, photos: Sequence[bytes]) -> dict[str, Any]:
    files = [("photos", ("photo", each)) for each in photos]
    return client.call("POST", f"/v1/spaces/{space}/classes", data={"name": name}, files=files).json()


# Lightweight clients -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An answer; status 0: the connection ended without one, -1: it could not be opened."""

    status: int
    body: bytes = b""
    head: bytes = b""


class Connection(asyncio.Protocol):
    """A persistent connection: one request at a time, sent as prepared bytes."""

    def __init__(self) -> None:
        self.open = False
        self._came = bytearray()
        self._waits: asyncio.Future[Reply] | None = None

    @classmethod
    async def to(cls, port: int) -> Self:
        return (await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port))[1]

    async def ask(self, request: bytes) -> Reply:
        self._waits = asyncio.get_running_loop().create_future()
        if self.open:
            self._transport.write(request)
        else:
            self._waits.set_result(Reply(0))
        return await self._waits

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.open = True

    def data_received(self, data: bytes) -> None:
        self._came += data
        if (end := self._came.find(b"\r\n\r\n")) < 0:
            return
        head = bytes(self._came[:end])
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        assert length, f"an answer without a length: {head!r}"
        if len(self._came) >= (whole := end + 4 + int(length[1])):
            if re.search(rb"\r\nconnection: *close", head, re.IGNORECASE):
                self.open = False
            body = bytes(self._came[end + 4 : whole])
            del self._came[:whole]
            self._answer(Reply(int(head[9:12]), body, head))

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self._answer(Reply(0))

    def _answer(self, reply: Reply) -> None:
        if self._waits is not None and not self._waits.done():
            self._waits.set_result(reply)


class Connections:
    """A pool with as many connections as concurrent requests; idle ones are reused."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: deque[Connection] = deque()

    async def ask(self, request: bytes) -> Reply:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                break
        else:
            try:
                connection = await Connection.to(self._port)
            except OSError:
                return Reply(-1)
        reply = await connection.ask(request)
        if connection.open:
            self._idle.append(connection)
        return reply

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def request(path: str, body: bytes, content_type: str, **headers: str) -> bytes:
    """A POST request as bytes."""
    head = {"Host": "127.0.0.1", "Content-Type": content_type, "Content-Length": str(len(body))}
    head |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def form(photos: Sequence[bytes]) -> tuple[bytes, str]:
    """Photos as a multipart body, and its content type."""
    head = b'--edge\r\nContent-Disposition: form-data; name="photos"; filename="photo"\r\n\r\n'
    return b"".join(head + each + b"\r\n" for each in photos) + b"--edge--\r\n", "multipart/form-data; boundary=edge"


@dataclass(frozen=True)
class Sent:
    """A request of a load: its scheduled time and its answer. Times are in seconds from the start of the load."""

    due: float
    took: float  # from the scheduled time, so that a lagging generator or server does not hide latency
    reply: Reply


async def saturate(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> list[Sent]:
    """Closed-loop clients: each sends a request when the previous one is answered, or shortly after a refusal."""
    began = time.perf_counter()
    sent: list[Sent] = []

    async def client(number: int) -> None:
        connection = await Connection.to(port)
        turn = number
        while (due := time.perf_counter() - began) < seconds:
            reply = await connection.ask(requests[turn % len(requests)])
            sent.append(Sent(due, time.perf_counter() - began - due, reply))
            turn += clients
            if reply.status == 429:
                await asyncio.sleep(0.05)
            if not connection.open:
                connection = await Connection.to(port)
        connection.close()

    await asyncio.gather(*[client(number) for number in range(clients)])
    return sent


async def arrivals(port: int, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0) -> list[Sent]:
    """An open loop: requests arrive at random times (Poisson), independent of earlier answers."""
    random = np.random.default_rng(seed)
    times = np.cumsum(random.exponential(1 / rate, round(rate * seconds * 1.5) + 50))
    sent: list[Sent] = []
    tasks: set[asyncio.Task[None]] = set()
    gc.collect()
    gc.disable()  # at 20,000 requests it paused the generator for 0.3 s, which looked like latency of the server
    connections, began = Connections(port), time.perf_counter()

    async def one(number: int, due: float) -> None:
        reply = await connections.ask(requests[number % len(requests)])
        sent.append(Sent(due, time.perf_counter() - began - due, reply))

    for number, due in enumerate(times[times < seconds].tolist()):
        if (wait := due - (time.perf_counter() - began)) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(number, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    connections.close()
    gc.enable()
    return sent


@contextmanager
def meanwhile(function: Callable[[], None], pause: float = 0.0) -> Iterator[None]:
    """Call a function repeatedly in a thread while the block runs; the last call completes."""
    ended = threading.Event()

    def again() -> None:
        while not ended.wait(pause):
            function()

    thread = threading.Thread(target=again)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# Figures -----------------------------------------------------------------------------------------------------------


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median and maximum, in ms."""
    if not len(seconds):
        return {}
    named = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    return {name: round(1000 * float(np.percentile(seconds, share)), 1) for name, share in named.items()}


def bar(what: str, came: float, bound: float, met: bool, unit: str = "") -> dict[str, Any]:
    """Compare a figure with its target; printed, and returned for the results."""
    print(f"{'met   ' if met else 'MISSED'}  {what}: {came:g} {unit} (bar {bound:g})", flush=True)
    return {"what": what, "figure": came, "bar": bound, "unit": unit, "met": bool(met)}


def write(name: str, found: Mapping[str, Any], *packages: str) -> None:
    """Write results to bench/results, with a description of the machine."""
    about = {
        "machine": f"{machine()}, {os.cpu_count()} threads",
        "versions": {each: version(each) for each in ("kshot", "onnxruntime-gpu", "fastapi", "uvicorn", *packages)}
        | {"python": platform.python_version()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"what": found["what"], **about, **found}, indent=2) + "\n")
    print(f"\n{found['what']}; {about['machine']}. Written to {RESULTS / name}.json")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=(doc or "").splitlines()[0])
