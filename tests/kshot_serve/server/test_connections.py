"""What connections may cost: slow, silent, endless and unread ones, and more of them than there may be."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kshot_serve.server.connections import raise_file_limit
from kshot_serve.settings import Settings

Photo = Callable[..., bytes]
Running = Any  # of conftest.py
Start = Callable[[Settings], AbstractContextManager[Running]]

KSHOT = Path(sys.executable).with_name("kshot")


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def connected(url: str, *lines: str, buffer: int = 0) -> socket.socket:
    """A connection that has sent these lines; with `buffer`, the system keeps so few bytes that it has not read."""
    there = socket.socket()
    there.settimeout(20)
    if buffer:
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    there.connect(address(url))
    there.sendall("".join(f"{line}\r\n" for line in lines).encode())
    return there


def answer(there: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer; the body as far as its length says."""
    came = b""
    while b"\r\n\r\n" not in came:
        piece = there.recv(65536)
        assert piece, f"the connection ended after {came!r}"
        came += piece
    head, _, body = came.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += there.recv(65536)
    return int(first.split()[1]), headers, body


def gone(there: socket.socket) -> bool:
    """Whether the server has closed the connection, after whatever it had sent."""
    try:
        while there.recv(1 << 20):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    given_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < given_up, "what was waited for did not come"
        time.sleep(0.01)


def counted(exposed: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in exposed.splitlines() if line.startswith(name))


def metric(http: httpx.Client, name: str) -> float:
    return counted(http.get("/metrics").text, name)


# Slow and endless heads --------------------------------------------------------------------------------------------


def test_a_slow_body_and_a_slow_head_are_given_up(features_bundle: Path, tmp_path: Path, running: Start) -> None:
    """Slowloris: a client that sends a byte now and then held a place for ever."""
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, body_s=0.3, headers_s=0.3)
    with running(settings) as server:
        host = server.url.removeprefix("http://")
        address = host.split(":")[0], int(host.split(":")[1])
        with socket.create_connection(address, timeout=10) as slow:
            slow.sendall(f"POST /v1/embed HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n".encode())
            slow.sendall(b"Content-Type: image/png\r\n\r\nabc")
            assert b"408" in slow.recv(65536).split(b"\r\n")[0]
        with socket.create_connection(address, timeout=10) as slow:
            slow.sendall(b"GET /v2 HTTP/1.1\r\nHost: ")
            assert slow.recv(65536) == b""  # hung up
        with socket.create_connection(address, timeout=10) as idle:
            assert idle.recv(65536) == b""


def test_a_request_that_came_while_the_server_was_busy_is_answered_though_its_connection_was_idle_for_long(
    features_bundle: Path, tmp_path: Path, running: Start
) -> None:
    """Seen under overload: the clock ran out while the request lay in the socket, and nobody had looked."""
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, idle_s=0.5)
    busy, others = socket.socketpair()

    class Busy(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            time.sleep(1.0)

    with running(settings) as server, others:
        host, loop = server.url.removeprefix("http://"), server.backend.engine._loop
        asyncio.run_coroutine_threadsafe(loop.create_connection(Busy, sock=busy), loop).result(10)
        with socket.create_connection((host.split(":")[0], int(host.split(":")[1])), timeout=10) as kept:
            for wait in (0.0, 0.2):
                time.sleep(wait)
                kept.sendall(f"GET /v2 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                assert kept.recv(65536).startswith(b"HTTP/1.1 200")
                others.send(b"-")
            time.sleep(1.0)
            assert kept.recv(65536) == b""  # hung up


def test_a_head_that_does_not_end_is_hung_up_on(server: Running) -> None:
    host = server.url.removeprefix("http://")
    with socket.create_connection((host.split(":")[0], int(host.split(":")[1])), timeout=10) as endless:
        endless.sendall(f"GET /v2 HTTP/1.1\r\nHost: {host}\r\n".encode())
        with pytest.raises(ConnectionError):
            endless.sendall(10_000 * (b"X-More: " + 990 * b"a" + b"\r\n"))
    assert server.http.get("/v2", headers={"X-Long": 8000 * "a"}).status_code == 200


def test_a_request_behind_a_body_that_was_refused_is_answered_however_the_bytes_fall(server: Running) -> None:
    """Seen under overload: the end of a body and the beginning of a head in one chunk were all taken for a head."""
    host = server.url.removeprefix("http://")
    body = b"x" * 70_000_000
    first = f"POST /v1/embed HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    following = f"GET /v2 HTTP/1.1\r\nHost: {host}\r\n".encode()
    with socket.create_connection((host.split(":")[0], int(host.split(":")[1])), timeout=10) as kept:
        kept.sendall(first.encode() + body[:-200_000])
        assert b" 413 " in kept.recv(65536)
        kept.sendall(body[-200_000:] + following)
        time.sleep(0.3)
        kept.sendall(b"\r\n")
        assert kept.recv(65536).startswith(b"HTTP/1.1 200")


# What is no HTTP ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 2, 40])
def test_the_first_chunk_of_a_head_counts_for_its_limit(server: Running, chunks: int) -> None:
    """S14: heads of 100 kB passed, as one chunk and as two."""
    host = server.url.removeprefix("http://")
    for size, expected in ((100_000, 400), (60_000, 200)):
        lines = [f"X-{number}: {'a' * 990}" for number in range(size // 1000)]
        whole = "\r\n".join(["GET /v2 HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()
        with connected(server.url) as there:
            for start in range(0, len(whole), step := -(-len(whole) // chunks)):
                try:
                    there.sendall(whole[start : start + step])
                except ConnectionError:  # refused, and closed, before it was sent
                    assert expected == 400
                    break
                time.sleep(0.01 if chunks > 1 else 0)
            try:
                status, _, body = answer(there)
            except ConnectionError:  # closed while more was on its way
                assert expected == 400
                continue
            assert status == expected
            assert (b"at most 64 kB" in body) == (expected == 400)


def test_one_long_header_is_refused_before_it_ends(server: Running) -> None:
    def send() -> None:
        for _ in range(1000):
            there.sendall(b"X-Long: " + b"a" * 10_000)
            time.sleep(0.001)

    with connected(server.url, "GET /v2 HTTP/1.1") as there, pytest.raises(ConnectionError):
        send()


@pytest.mark.parametrize("path", ["/v1/spaces", "/v2/models"])
@pytest.mark.parametrize("fault", ["Bad Header", "Content-Length: 1\r\nContent-Length: 2", "X: a\0b"])
def test_what_is_no_http_is_refused_in_the_shape_of_the_api_counted_and_logged(
    server: Running, caplog: pytest.LogCaptureFixture, path: str, fault: str
) -> None:
    """B10: errors of the parser were plain text, in neither log nor metrics."""
    name = 'kshot_refusals_total{code="bad_request",reason="http"}'
    before = metric(server.http, name)
    with caplog.at_level(logging.INFO, "kshot.serve"), connected(server.url) as there:
        there.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{fault}\r\n\r\n".encode())
        status, headers, body = answer(there)
        assert gone(there)
    assert (status, headers["content-type"], headers["connection"]) == (400, "application/json", "close")
    error = json.loads(body)["error"]
    assert (error if path.startswith("/v2") else error["message"]) == "this is no HTTP/1.1 request that can be read"
    assert metric(server.http, name) == before + 1
    assert [record for record in caplog.records if getattr(record, "fields", {}).get("status") == 400]


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["localhost", "localhost"], 400),
        (["localhost", "evil.example"], 400),
        ([], 400),
        (["localhost:80@evil.example"], 400),
        (["user@localhost"], 400),
        (["localhost/v1"], 400),
        (["localhost, evil.example"], 400),
        (["evil.example"], 421),
        (["localhost"], 200),
    ],
)
def test_a_request_has_one_host_and_no_user_in_it(server: Running, hosts: list[str], expected: int) -> None:
    """S14: two Host headers, and a name with a user's part, were taken (RFC 9112, 3.2: 400)."""
    with connected(server.url, "GET /v2 HTTP/1.1", *(f"Host: {host}" for host in hosts), "") as there:
        status, _, body = answer(there)
    assert status == expected
    if expected != 200:
        assert json.loads(body)["error"]


# Answers that are not read -----------------------------------------------------------------------------------------


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
    features_bundle: Path, tmp_path: Path, running: Start, monkeypatch: pytest.MonkeyPatch
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
        exposed = server.http.get("/metrics", headers=other).text
        assert counted(exposed, 'kshot_connections_cut_total{why="unread"}') >= 2
        assert len(readers) == 20
        assert len(reads) < 8  # those that were refused were not read before
        assert server.http.get(path, headers=slow).content == content


def test_exports_that_are_not_read_are_few_and_leave_no_file(
    features_bundle: Path, tmp_path: Path, running: Start
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


def test_a_slow_reader_gets_all_of_a_large_answer(features_bundle: Path, tmp_path: Path, running: Start) -> None:
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
    features_bundle: Path, tmp_path: Path, running: Start
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, unread_s=0.5)
    with running(settings) as server:
        assert server.server._acceptor is not None
        listener = server.server._acceptor._listener
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # which its connections inherit
        lines = ["GET / HTTP/1.1", f"Host: {server.url.removeprefix('http://')}", ""] * 30
        with connected(server.url, *lines, buffer=4096) as there:
            until(lambda: metric(server.http, 'kshot_connections_cut_total{why="unread"}') == 1)
            assert gone(there)
            assert len(server.http.get("/").content) < 64_000


def test_requests_behind_each_other_on_one_connection_are_few(server: Running) -> None:
    """Seen while S2 was mended: 26,000 requests were queued by one connection whose answers nobody read."""
    lines = ["GET /v2 HTTP/1.1", f"Host: {server.url.removeprefix('http://')}", ""]
    with connected(server.url, *lines * 16) as some:
        came = b""
        while came.count(b'"kshot"') < 16:
            came += some.recv(65536)
    before = metric(server.http, 'kshot_refusals_total{code="bad_request",reason="http"}')
    with connected(server.url, *lines * 2000) as many:
        assert gone(many)
    assert metric(server.http, 'kshot_refusals_total{code="bad_request",reason="http"}') == before + 1


def test_a_photo_is_not_read_again_for_a_client_that_has_it(
    server: Running, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = server.http.post("/v1/spaces", json={"name": "tags of photos"}).json()["id"]
    added = server.http.post(
        f"/v1/spaces/{space}/classes", data={"name": "red"}, files=[("photos", ("photo", photo("red")))]
    )
    path = f"/v1/spaces/{space}/photos/{added.json()['photos'][0]}"
    there = server.http.get(path)

    def read(*_: object) -> None:
        raise AssertionError("the photo was read")

    monkeypatch.setattr(server.backend.store, "photo", read)
    again = server.http.get(path, headers={"If-None-Match": there.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert server.http.get(path).status_code == 500


# More connections than there may be --------------------------------------------------------------------------------


def test_the_limit_of_open_files_is_raised_as_far_as_the_system_lets() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_idle_connections_make_way_for_new_ones(
    features_bundle: Path, tmp_path: Path, running: Start, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, connections=16)
    with running(settings) as server, ExitStack() as open_:
        assert server.http.get("/v2").status_code == 200  # a connection that is kept, and was answered
        silent = [open_.enter_context(connected(server.url)) for _ in range(15)]
        until(lambda: metric(server.http, "kshot_connections ") == 16)
        more = [open_.enter_context(connected(server.url)) for _ in range(10)]
        until(lambda: metric(server.http, 'kshot_connections_cut_total{why="full"}') == 10)
        assert all(map(gone, silent[:10]))  # the oldest of those that never asked anything
        assert metric(server.http, "kshot_connections ") == 16
        told = [record for record in caplog.records if "connections are open" in record.getMessage()]
        assert len(told) == 1
        assert more


def test_when_all_connections_are_at_work_new_ones_are_refused_but_for_the_health_checks(
    features_bundle: Path, tmp_path: Path, running: Start
) -> None:
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, connections=16, share=1.0, body_s=60
    )
    with running(settings) as server, ExitStack() as open_:
        server.http.close()
        until(lambda: server.backend.metrics.connections._value.get() == 0)
        host = server.url.removeprefix("http://")
        lines = ["POST /v1/embed HTTP/1.1", f"Host: {host}", "Content-Type: image/png", "Content-Length: 9", ""]
        for _ in range(16):
            open_.enter_context(connected(server.url, *lines))
        until(lambda: server.backend.budgets.requests.taken == 16)
        with httpx.Client(base_url=server.url) as http:
            assert http.get("/healthz/live").status_code == 200
        with httpx.Client(base_url=server.url) as http:
            refused = http.get("/v1/spaces")
        assert (refused.status_code, refused.json()["error"]["reason"]) == (429, "connections")
        assert refused.headers["connection"] == "close"


def test_one_key_cannot_have_all_requests_under_way_and_its_next_ones_cost_little(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo
) -> None:
    """Heads without bodies, which wait for half a minute each."""
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, requests=40, keys="required"
    )  # fmt: skip
    with running(settings) as server, ExitStack() as open_:
        (greedy, one), (_, two) = (server.backend.keys.new(name, "read") for name in ("greedy", "other"))
        key = f"X-API-Key: {one}"
        lines = ["POST /v1/embed HTTP/1.1", "Host: localhost", "Content-Type: image/png", "Content-Length: 9", key, ""]
        for _ in range(20):
            open_.enter_context(connected(server.url, *lines))
        until(lambda: server.backend.budgets.requests.held[greedy.id] == 20)
        found = [answer(open_.enter_context(connected(server.url, *lines))) for _ in range(13)]
        assert [status for status, _, _ in found] == [429] * 13
        reasons = [json.loads(body)["error"]["reason"] for _, _, body in found]
        # The last ones by the connection, which costs little, and not by the application.
        assert reasons == ["requests"] * 11 + ["again"] * 2
        assert all(headers["retry-after"] == "1" for _, headers, _ in found)
        live = answer(
            open_.enter_context(connected(server.url, "GET /healthz/live HTTP/1.1", "Host: localhost", key, ""))
        )
        assert live[0] == 200
        for shade in range(5):
            answered = server.http.post(
                "/v1/embed", content=photo("red", shade), headers={"Content-Type": "image/png", "X-API-Key": two}
            )
            assert answered.status_code == 200
        assert server.backend.budgets.requests.held[greedy.id] == 20
        time.sleep(1.1)
        assert (
            json.loads(answer(open_.enter_context(connected(server.url, *lines)))[2])["error"]["reason"] == "requests"
        )


@contextmanager
def limited(bundle: Path, folder: Path, soft: int, hard: int) -> Iterator[tuple[str, Path]]:
    """A server in a process of its own that may open so many files: its address, and its log."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with (log := folder / "log").open("w") as errors:
        process = subprocess.Popen(
            [KSHOT, "serve", bundle, "--port", "0", "--folder", folder],
            stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=limit,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("kshot serves"), log.read_text()
        yield line.split()[-1], log
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.parametrize(("hard", "most"), [(256, 128), (1024, 896)])
def test_a_server_that_may_open_few_files_stays_alive_under_idle_connections(
    features_bundle: Path, tmp_path: Path, hard: int, most: int
) -> None:
    """S12: with `ulimit -n 256`, 230 idle connections made every new one end unread for 75 s, without a word."""
    with limited(features_bundle, tmp_path, 256, hard) as (url, log), ExitStack() as open_:
        for _ in range(most + 300 if hard == 256 else 400):
            open_.enter_context(connected(url))
        host = f"Host: {url.removeprefix('http://')}"
        found = b""
        for path in (*["/healthz/live"] * 20, "/v1/spaces", "/metrics"):
            with connected(url, f"GET {path} HTTP/1.1", host, "Connection: close", "") as there:
                status, _, found = answer(there)
                assert status == 200
        open_now, cut = (
            counted(found.decode(), "kshot_connections "),
            counted(found.decode(), "kshot_connections_cut_total"),
        )
        told = [line for line in log.read_text().splitlines() if "connections are open" in line]
        if hard == 256:
            assert open_now == most
            assert cut >= 300
            assert len(told) == 1
        else:
            assert open_now > 400
            assert not told
