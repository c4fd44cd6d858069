"""What arrives: slow, endless and malformed heads, and requests behind each other."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from kshot_serve.settings import Settings

Running = Any  # of conftest.py, as the others here
Connect = Callable[..., Any]
Until = Callable[..., None]
Start = Callable[[Settings], AbstractContextManager[Running]]


def test_a_slow_body_and_a_slow_head_are_given_up(
    features_bundle: Path, tmp_path: Path, running: Start, connected: Connect
) -> None:
    """Slowloris: a client that sends a byte now and then held a place for ever."""
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, body_s=0.3, headers_s=0.3)
    with running(settings) as server:
        host = server.url.removeprefix("http://")
        with connected(server.url) as slow:
            slow.sendall(f"POST /v1/embed HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n".encode())
            slow.sendall(b"Content-Type: image/png\r\n\r\nabc")
            assert b"408" in slow.recv(65536).split(b"\r\n")[0]
        with connected(server.url) as slow:
            slow.sendall(b"GET /v2 HTTP/1.1\r\nHost: ")
            assert slow.recv(65536) == b""  # hung up
        with connected(server.url) as idle:
            assert idle.recv(65536) == b""
        assert server.metric('kshot_connections_cut_total{why="late"}') == 2


def test_a_request_that_came_while_the_server_was_busy_is_answered_though_its_connection_was_idle_for_long(
    features_bundle: Path, tmp_path: Path, running: Start, connected: Connect
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
        with connected(server.url) as kept:
            for wait in (0.0, 0.2):
                time.sleep(wait)
                kept.sendall(f"GET /v2 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                assert kept.recv(65536).startswith(b"HTTP/1.1 200")
                others.send(b"-")
            time.sleep(1.0)
            assert kept.recv(65536) == b""  # hung up
            assert server.metric('kshot_connections_cut_total{why="idle"}') >= 1


def test_a_head_that_does_not_end_is_hung_up_on(server: Running, connected: Connect) -> None:
    host = server.url.removeprefix("http://")
    with connected(server.url) as endless:
        endless.sendall(f"GET /v2 HTTP/1.1\r\nHost: {host}\r\n".encode())
        with pytest.raises(ConnectionError):
            endless.sendall(10_000 * (b"X-More: " + 990 * b"a" + b"\r\n"))
    assert server.http.get("/v2", headers={"X-Long": 8000 * "a"}).status_code == 200


def test_a_request_behind_a_body_that_was_refused_is_answered_however_the_bytes_fall(
    server: Running, connected: Connect
) -> None:
    """Seen under overload: the end of a body and the beginning of a head in one chunk were all taken for a head."""
    host = server.url.removeprefix("http://")
    body = b"x" * 70_000_000
    first = f"POST /v1/embed HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    following = f"GET /v2 HTTP/1.1\r\nHost: {host}\r\n".encode()
    with connected(server.url) as kept:
        kept.sendall(first.encode() + body[:-200_000])
        assert b" 413 " in kept.recv(65536)
        kept.sendall(body[-200_000:] + following)
        time.sleep(0.3)
        kept.sendall(b"\r\n")
        assert kept.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("chunks", [1, 2, 40])
def test_the_first_chunk_of_a_head_counts_for_its_limit(server: Running, chunks: int, connected: Connect) -> None:
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
                status, _, body = there.answer()
            except ConnectionError:  # closed while more was on its way
                assert expected == 400
                continue
            assert status == expected
            assert (b"at most 64 kB" in body) == (expected == 400)


def test_one_long_header_is_refused_before_it_ends(server: Running, connected: Connect) -> None:
    def send() -> None:
        for _ in range(1000):
            there.sendall(b"X-Long: " + b"a" * 10_000)
            time.sleep(0.001)

    with connected(server.url, "GET /v2 HTTP/1.1") as there, pytest.raises(ConnectionError):
        send()


@pytest.mark.parametrize("path", ["/v1/spaces", "/v2/models"])
@pytest.mark.parametrize("fault", ["Bad Header", "Content-Length: 1\r\nContent-Length: 2", "X: a\0b"])
def test_what_is_no_http_is_refused_in_the_shape_of_the_api_counted_and_logged(
    server: Running, caplog: pytest.LogCaptureFixture, path: str, fault: str, connected: Connect
) -> None:
    """B10: errors of the parser were plain text, in neither log nor metrics."""
    name = 'kshot_refusals_total{code="bad_request",reason="http"}'
    before = server.metric(name)
    with caplog.at_level(logging.INFO, "kshot.serve"), connected(server.url) as there:
        there.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{fault}\r\n\r\n".encode())
        status, headers, body = there.answer()
        assert there.gone()
    assert (status, headers["content-type"], headers["connection"]) == (400, "application/json", "close")
    error = json.loads(body)["error"]
    assert (error if path.startswith("/v2") else error["message"]) == "this is no HTTP/1.1 request that can be read"
    assert server.metric(name) == before + 1
    [logged] = [each for record in caplog.records if (each := getattr(record, "fields", {})).get("status") == 400]
    assert logged["request_id"] == headers["x-request-id"]
    assert path.startswith("/v2") or error["request_id"] == logged["request_id"]


@pytest.mark.parametrize(
    "hello",
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes.fromhex("160301002f0100002b0303") + bytes(41)],
    ids=["gRPC", "TLS"],
)
def test_what_is_spoken_is_plain_http_1(server: Running, connected: Connect, hello: bytes) -> None:
    with connected(server.url) as there:
        there.sendall(hello)
        assert there.answer()[0] == 400
        assert there.gone()


def test_the_end_waits_for_no_body_longer_than_it_is_told(
    features_bundle: Path, tmp_path: Path, running: Start, connected: Connect, until: Until
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, drain_s=1, body_s=300)
    lines = ("POST /v1/embed HTTP/1.1", "Host: localhost", "Content-Type: image/png", "Content-Length: 9", "")
    with running(settings) as server, connected(server.url, *lines) as slow:
        until(lambda: server.backend.budgets.requests.taken == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        assert slow.gone()


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
def test_a_request_has_one_host_and_no_user_in_it(
    server: Running, hosts: list[str], expected: int, connected: Connect
) -> None:
    """S14: two Host headers, and a name with a user's part, were taken (RFC 9112, 3.2: 400)."""
    with connected(server.url, "GET /v2 HTTP/1.1", *(f"Host: {host}" for host in hosts), "") as there:
        status, _, body = there.answer()
    assert status == expected
    if expected != 200:
        assert json.loads(body)["error"]


def test_requests_behind_each_other_on_one_connection_are_few(server: Running, connected: Connect) -> None:
    """Seen while S2 was mended: 26,000 requests were queued by one connection whose answers nobody read."""
    lines = ["GET /v2 HTTP/1.1", f"Host: {server.url.removeprefix('http://')}", ""]
    with connected(server.url, *lines * 16) as some:
        came = b""
        while came.count(b'"kshot"') < 16:
            came += some.recv(65536)
    before = server.metric('kshot_refusals_total{code="bad_request",reason="http"}')
    with connected(server.url, *lines * 2000) as many:
        assert many.gone()
    assert server.metric('kshot_refusals_total{code="bad_request",reason="http"}') == before + 1
