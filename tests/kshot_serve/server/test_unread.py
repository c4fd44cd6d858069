"""Answers that are not read, or slowly."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest

from kshot_serve.settings import Settings

Running = Any  # of conftest.py, as the others here
Connect = Callable[..., Any]
Until = Callable[..., None]
Start = Callable[[Settings], AbstractContextManager[Running]]


def large_photo(server: Running, key: dict[str, str]) -> tuple[str, bytes]:
    """The path of a kept photo of 15 MB, and its bytes: a small PNG with a long chunk that decoders pass over."""
    import io
    import struct
    import zlib

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "PNG")
    plain, long = file.getvalue(), b"kSht" + bytes(15_000_000)
    photo = plain[:-12] + struct.pack(">I", len(long) - 4) + long + struct.pack(">I", zlib.crc32(long)) + plain[-12:]
    space = server.http.post("/v1/spaces", json={"name": f"large {time.time()}"}, headers=key).json()["id"]
    added = server.http.post(
        f"/v1/spaces/{space}/classes", data={"name": "red"}, files=[("photos", ("photo", photo))], headers=key
    )
    assert added.status_code == 201, added.text
    return f"/v1/spaces/{space}/photos/{added.json()['photos'][0]}", photo


def test_unread_answers_are_bounded_for_each_key_and_closed(
    features_bundle: Path,
    tmp_path: Path,
    running: Start,
    monkeypatch: pytest.MonkeyPatch,
    connected: Connect,
    until: Until,
) -> None:
    """S2: sixty photos of 19 MB, asked for with a read key and never read, took 1.2 GB, and kept it."""
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, keys="required", answers_mb=64, unread_s=1.0
    )
    with running(settings) as server, ExitStack() as open_:
        keys = {name: server.backend.keys.new(name, "write")[1] for name in ("slow", "other")}
        slow, other = ({"X-API-Key": key} for key in keys.values())
        path, content = large_photo(server, slow)
        answers, store, reads = server.backend.budgets.answers, server.backend.store, []
        read = store.photo
        monkeypatch.setattr(store, "photo", lambda *asked: reads.append(asked) or read(*asked))
        lines = [f"GET {path} HTTP/1.1", "Host: localhost", f"X-API-Key: {keys['slow']}", ""]
        readers = [open_.enter_context(connected(server.url, *lines, buffer=4096)) for _ in range(20)]
        until(lambda: answers.taken >= 30_000_000)  # two of them: half of the 64 MB is one key's share
        refused = server.http.get(path, headers=slow)
        assert (refused.status_code, refused.json()["error"]["reason"]) == (429, "answers")
        assert server.http.get(path, headers=other).content == content
        until(lambda: answers.taken == 0)  # nothing was read for a second
        assert server.metric('kshot_connections_cut_total{why="unread"}', headers=other) >= 2
        assert len(readers) == 20
        assert len(reads) < 8  # those that were refused were not read before
        assert server.http.get(path, headers=slow).content == content


def test_exports_that_are_not_read_are_few_and_leave_no_file(
    features_bundle: Path, tmp_path: Path, running: Start, connected: Connect, until: Until
) -> None:
    """Each is a file of a whole label space, and /tmp may be memory."""
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, unread_s=1.0)
    with running(settings) as server, ExitStack() as open_:
        path, _ = large_photo(server, {})
        path = f"{path.split('/photos')[0]}/export"
        exports = server.backend.budgets.exports
        lines = [f"GET {path} HTTP/1.1", f"Host: {server.url.removeprefix('http://')}", ""]
        for _ in range(2):
            open_.enter_context(connected(server.url, *lines, buffer=4096))
        until(lambda: exports.taken == 2)
        refused = server.http.get(path)
        assert (refused.status_code, refused.json()["error"]["reason"]) == (429, "answers")
        until(lambda: exports.taken == 0)  # nothing was read for a second
        assert server.http.get(path).status_code == 200
        assert exports.taken == 0


def test_a_slow_reader_gets_all_of_a_large_answer(
    features_bundle: Path, tmp_path: Path, running: Start, connected: Connect, until: Until
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, unread_s=2.0)
    with running(settings) as server:
        path, content = large_photo(server, {})
        host = server.url.removeprefix("http://")
        with connected(server.url, f"GET {path} HTTP/1.1", f"Host: {host}", "", buffer=65536) as there:
            came = bytearray()
            while len(came) < len(content):
                time.sleep(0.02)
                piece = there.recv(65536)
                assert piece
                came += piece
        until(lambda: server.backend.budgets.answers.taken == 0)


def test_small_answers_that_are_not_read_are_given_up_too(
    features_bundle: Path, tmp_path: Path, running: Start, connected: Connect, until: Until
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, unread_s=0.5)
    with running(settings) as server:
        assert server.server._acceptor is not None
        listener = server.server._acceptor._listener
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # which its connections inherit
        lines = ["GET / HTTP/1.1", f"Host: {server.url.removeprefix('http://')}", ""] * 30
        with connected(server.url, *lines, buffer=4096) as there:
            until(lambda: server.metric('kshot_connections_cut_total{why="unread"}') == 1)
            assert there.gone()
            assert len(server.http.get("/").content) < 64_000
