"""What one caller may cost the others: real servers and sockets, and small files of many pixels."""

from __future__ import annotations

import asyncio
import io
import json
import os
import struct
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from kshot_runtime.images import ImageLimits, ImageRule, undecoded
from kshot_serve.budgets import current_caller
from kshot_serve.errors import Problem
from kshot_serve.inference.engine import Engine
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import EngineSettings, Settings
from kshot_serve.spaces.uploads import Decoder, Upload
from kshot_serve.storage.keys import Keys
from kshot_serve.storage.store import Store
from kshot_serve.storage.values import digest

if TYPE_CHECKING:
    from tests.kshot_serve.conftest import Running  # never at run time: tests are no packages

Start = Callable[[Settings], "AbstractContextManager[Running]"]
Photo = Callable[..., bytes]


def bomb(side: int, shade: int = 0) -> bytes:
    """A PNG with alpha of side x side pixels in a thousandth of their bytes."""
    row = b"\0" + bytes([shade % 256, 9, 9, 128]) * side
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * side, 1)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def files(photos: list[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("photos", ("photo", each)) for each in photos]


def exported(photos: list[bytes], classes: int = 1) -> bytes:
    file = io.BytesIO()
    entries = [{"file": f"photos/{i:04}.png", "sha256": digest(each)} for i, each in enumerate(photos)]
    facts = {
        "name": "pets",
        "classes": [{"name": f"class {i}", "photos": entries if not i else []} for i in range(classes)],
        "model": {"name": "pets", "version": "1", "bundle": "b", "image": {"size": 16}},
    }
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, each in zip(entries, photos, strict=True):
            archive.writestr(entry["file"], each)
        archive.writestr("manifest.json", json.dumps(facts))
    return file.getvalue()


def decoding(body: Callable[[Decoder, Engine], Any], **settings: Any) -> None:
    async def whole() -> None:
        engine = EngineSettings(runners=1, threads=1, decoders=2, decode_mp=settings.pop("decode_mp", 64))
        chosen = Settings(source="", engine=engine, **settings)
        metrics = Metrics()
        made = Engine(chosen.engine, metrics)
        await made.start()
        await body(Decoder(made, chosen, metrics), made)
        await made.stop(30)

    asyncio.run(whole())


RULE = ImageRule(size=16)


def test_pixels_that_are_decoded_at_once_are_bounded_and_callers_have_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """S3: 32 of them in each of four requests held all decoders, and others' photos waited for minutes."""
    at_once, most, order, lock = 0, 0, list[str](), threading.Lock()
    real = type(undecoded(bomb(16), RULE)).decode

    def decode(self: Any) -> Any:
        nonlocal at_once, most
        with lock:
            at_once += self.pixels
            most = max(most, at_once)
            order.append("other" if self.pixels == 1100 * 1100 else "greedy")
        time.sleep(0.05)
        with lock:
            at_once -= self.pixels
        return real(self)

    monkeypatch.setattr("kshot_runtime.images.Undecoded.decode", decode)

    async def body(decoder: Decoder, _: Engine) -> None:
        async def read(caller: str, photo: bytes, count: int) -> None:
            current_caller.set(caller)
            found = await decoder.read([photo] * count, RULE)
            assert all(isinstance(each, Upload) for each in found)

        greedy = [asyncio.create_task(read("greedy", bomb(1200), 8)) for _ in range(2)]
        while not order:
            await asyncio.sleep(0.005)
        await read("other", bomb(1100), 1)
        assert order.index("other") < 6
        await asyncio.gather(*greedy)

    decoding(body, decode_mp=3)
    assert most <= 3_000_000
    assert order.count("greedy") == 16


def test_a_small_photo_does_not_wait_for_large_ones(monkeypatch: pytest.MonkeyPatch, photo: Photo) -> None:
    small = photo("red", kind="PNG", size=(90, 90))
    assert len(small) > 8192  # what is smaller is decoded where it is

    async def body(decoder: Decoder, _: Engine) -> None:
        current_caller.set("greedy")
        greedy = asyncio.create_task(decoder.read([bomb(1500)] * 16, RULE))
        await asyncio.sleep(0.05)
        current_caller.set("other")
        [found] = await decoder.read([small], RULE)
        assert isinstance(found, Upload)
        assert not greedy.done()
        greedy.cancel()

    decoding(body)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_a_photo_of_more_than_a_megapixel_is_decoded_in_a_thread_of_low_priority(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[int, int] = {}
    real = type(undecoded(bomb(16), RULE)).decode

    def decode(self: Any) -> Any:
        found[self.pixels] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return real(self)

    monkeypatch.setattr("kshot_runtime.images.Undecoded.decode", decode)

    async def body(decoder: Decoder, _: Engine) -> None:
        await decoder.read_all([bomb(1000), bomb(1001)], RULE)

    decoding(body)
    assert found == {1000 * 1000: os.getpriority(os.PRIO_PROCESS, 0), 1001 * 1001: 5}


def test_the_large_photos_of_one_request_have_a_limit_of_pixels_in_all() -> None:
    async def body(decoder: Decoder, _: Engine) -> None:
        assert len(await decoder.read([bomb(1100)] * 3, RULE)) == 3
        with pytest.raises(
            Problem, match="4,840,000 pixels are in the photos of this request; at most 4,000,000"
        ) as told:
            await decoder.read([bomb(1100)] * 4, RULE)
        assert (told.value.code, told.value.reason) == ("photo_too_large", "pixels")

    decoding(body, request_mp=4)


def test_a_photo_that_is_kept_is_decoded_again_whatever_the_limit_is_now() -> None:
    async def body(decoder: Decoder, _: Engine) -> None:
        [refused] = await decoder.read([bomb(200)], RULE)
        assert isinstance(refused, Problem)
        [found] = await decoder.read([bomb(200)], RULE, kept=True)
        assert isinstance(found, Upload)

    decoding(body, image=ImageLimits(max_pixels_whole=100 * 100))


def test_decoding_adapting_and_an_import_keep_to_their_deadline(
    features_bundle: Path, tmp_path: Path, running: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S5: 32 photos were answered after 21.9 s, and an import of 14.8 kB kept all decoders busy for 57 s."""
    begun = []
    real = type(undecoded(bomb(16), RULE)).decode

    def decode(self: Any) -> Any:
        begun.append(self.pixels)
        time.sleep(0.2)
        return real(self)

    monkeypatch.setattr("kshot_runtime.images.Undecoded.decode", decode)
    engine = EngineSettings(deadline_s=0.5, decoders=1, runners=1)
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, engine=engine, import_s=0.5)
    with running(settings) as server:
        space = server.http.post("/v1/spaces", json={"name": "pets"}).json()["id"]
        added = files([bomb(1100, shade) for shade in range(16)])
        archive = exported([bomb(1100, shade) for shade in range(16)])
        for ask in (
            lambda: server.http.post(f"/v1/spaces/{space}/classes", data={"name": "cat"}, files=added),
            lambda: server.http.post("/v1/spaces/import", content=archive, headers={"Content-Type": "application/zip"}),
        ):
            begun.clear()
            started = time.perf_counter()
            answer = ask()
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_late")
            assert time.perf_counter() - started < 3
            time.sleep(1)
            assert len(begun) <= 5  # and the rest is not decoded for nobody
        assert server.http.get(f"/v1/spaces/{space}/classes").json()["classes"] == []
        assert len(server.http.get("/v1/spaces").json()["spaces"]) == 1


def test_a_client_that_hangs_up_stops_the_decoding_of_what_it_wanted_to_add(
    features_bundle: Path, tmp_path: Path, running: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    real = type(undecoded(bomb(16), RULE)).decode

    def decode(self: Any) -> Any:
        begun.append(self.pixels)
        time.sleep(0.2)
        return real(self)

    monkeypatch.setattr("kshot_runtime.images.Undecoded.decode", decode)
    engine = EngineSettings(deadline_s=60, decoders=1, runners=1)
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, engine=engine)
    with running(settings) as server:
        space = server.http.post("/v1/spaces", json={"name": "pets"}).json()["id"]
        added = files([bomb(1100, shade) for shade in range(16)])
        with httpx.Client(base_url=server.url, timeout=0.6) as hasty, pytest.raises(httpx.ReadTimeout):
            hasty.post(f"/v1/spaces/{space}/classes", data={"name": "cat"}, files=added)
        time.sleep(1.5)
        assert len(begun) <= 6
        assert server.http.get(f"/v1/spaces/{space}/classes").json()["classes"] == []


def test_a_zip_of_too_many_classes_is_refused_before_anything_is_written(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S6: 80,000 classes were written for 19 s and then refused; all other writes waited."""
    monkeypatch.setattr(server.backend.store, "run_writing", None)
    content = exported([], 40_000)
    answer = server.http.post("/v1/spaces/import", content=content, headers={"Content-Type": "application/zip"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "too_many_classes")


def test_heads_without_bodies_take_no_places(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo
) -> None:
    """S4: 300 heads a second with nothing behind them had 24 of 25 requests of others refused."""
    engine = EngineSettings(queue=8)
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, engine=engine)

    async def body(host: str, port: int) -> list[int]:
        head = f"POST /v1/embed HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: 9000\r\n\r\n"
        silent = []
        for _ in range(60):
            _, writer = await asyncio.open_connection(host, port)
            writer.write(head.encode())
            silent.append(writer)
        await asyncio.sleep(0.2)
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=30) as client:
            found = [await client.post("/v1/embed", content=photo("red"), headers={"Content-Type": "image/png"})]
        for writer in silent:
            writer.close()
        return [each.status_code for each in found]

    with running(settings) as server:
        host, port = server.url.removeprefix("http://").split(":")
        assert asyncio.run(body(host, int(port))) == [200]


def test_a_key_that_fills_the_queue_leaves_the_others_theirs(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(undecoded(bomb(16), RULE)).decode

    def decode(self: Any) -> Any:
        time.sleep(0.05)
        return real(self)

    monkeypatch.setattr("kshot_runtime.images.Undecoded.decode", decode)
    engine = EngineSettings(queue=16, decoders=2, runners=1)
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, engine=engine, keys="required")
    store = Store(settings.database_url)
    greedy, other = (Keys(store).new(name, "read")[1] for name in ("greedy", "other"))
    store.close()
    with running(settings) as server, ThreadPoolExecutor(24) as pool:
        ended = threading.Event()

        def flood() -> list[int]:
            statuses = []
            with httpx.Client(base_url=server.url, timeout=60, headers={"X-API-Key": greedy}) as client:
                while not ended.is_set():
                    statuses.append(client.post("/v1/embed", files=files([bomb(1100)] * 4)).status_code)
            return statuses

        floods = [pool.submit(flood) for _ in range(6)]
        time.sleep(0.5)
        with httpx.Client(base_url=server.url, timeout=60, headers={"X-API-Key": other}) as client:
            answers = [
                client.post("/v1/embed", content=photo("red"), headers={"Content-Type": "image/png"}).status_code
                for _ in range(20)
            ]
        ended.set()
        flooded = [status for each in floods for status in each.result()]
    assert answers == [200] * 20
    assert 429 in flooded
    assert set(flooded) <= {200, 429, 503}
