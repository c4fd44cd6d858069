"""More connections, files and requests than there may be."""

from __future__ import annotations

import gc
import json
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kshot_serve.server.connections import Connection, raise_file_limit
from kshot_serve.settings import Settings

Photo = Callable[..., bytes]
Running = Any  # of conftest.py, as the others here
Connect = Callable[..., Any]
Until = Callable[..., None]
Start = Callable[[Settings], AbstractContextManager[Running]]
KSHOT = Path(sys.executable).with_name("kshot")


def counted(exposed: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in exposed.splitlines() if line.startswith(name))


def test_the_limit_of_open_files_is_raised_as_far_as_the_system_lets() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_nothing_is_kept_of_connections_that_their_clients_reset(
    features_bundle: Path, tmp_path: Path, running: Start, connected: Connect, until: Until
) -> None:
    """uvicorn alone keeps each of them, with its last request, until it has been idle for too long."""
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0)
    with running(settings) as server:
        for _ in range(5):
            connection = connected(server.url, "GET /healthz/live HTTP/1.1", "Host: localhost", "")
            assert connection.answer()[0] == 200
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close resets it
            connection.close()
        until(lambda: not [each for each in gc.get_objects() if isinstance(each, Connection)])


def test_idle_connections_make_way_for_new_ones(
    features_bundle: Path,
    tmp_path: Path,
    running: Start,
    caplog: pytest.LogCaptureFixture,
    connected: Connect,
    until: Until,
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, connections=16)
    with running(settings) as server, ExitStack() as open_:
        assert server.http.get("/v2").status_code == 200  # a connection that is kept, and was answered
        silent = [open_.enter_context(connected(server.url)) for _ in range(15)]
        until(lambda: server.metric("kshot_connections ") == 16)
        more = [open_.enter_context(connected(server.url)) for _ in range(10)]
        until(lambda: server.metric('kshot_connections_cut_total{why="full"}') == 10)
        assert all(each.gone() for each in silent[:10])  # the oldest of those that never asked anything
        assert server.metric("kshot_connections ") == 16
        told = [record for record in caplog.records if "connections are open" in record.getMessage()]
        assert len(told) == 1
        assert more


def test_of_connections_that_were_answered_the_one_idle_for_longest_makes_way(
    features_bundle: Path, tmp_path: Path, running: Start, connected: Connect
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, connections=16)
    with running(settings) as server, ExitStack() as open_:
        lines = ["GET /v2 HTTP/1.1", f"Host: {server.url.removeprefix('http://')}", ""]

        def asks_again(there: Any) -> int:
            there.sendall("".join(f"{line}\r\n" for line in lines).encode())
            return int(there.answer()[0])

        kept = [open_.enter_context(connected(server.url)) for _ in range(16)]
        assert [asks_again(each) for each in [*kept, kept[0]]] == [200] * 17
        new = open_.enter_context(connected(server.url))
        assert asks_again(new) == 200
        assert kept[1].gone()
        assert [asks_again(each) for each in (kept[0], *kept[2:], new)] == [200] * 16


def test_when_all_connections_are_at_work_new_ones_are_refused_but_for_the_health_checks(
    features_bundle: Path, tmp_path: Path, running: Start, connected: Connect, until: Until
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
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo, connected: Connect, until: Until
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
        found = [open_.enter_context(connected(server.url, *lines)).answer() for _ in range(13)]
        assert [status for status, _, _ in found] == [429] * 13
        reasons = [json.loads(body)["error"]["reason"] for _, _, body in found]
        # The last ones by the connection, which costs little, and not by the application.
        assert reasons == ["requests"] * 11 + ["again"] * 2
        assert ["x-request-id" in headers for _, headers, _ in found] == [True] * 11 + [False] * 2
        assert all(headers["retry-after"] == "1" for _, headers, _ in found)
        live = open_.enter_context(connected(server.url, "GET /healthz/live HTTP/1.1", "Host: localhost", key, ""))
        assert live.answer()[0] == 200
        for shade in range(5):
            answered = server.http.post(
                "/v1/embed", content=photo("red", shade), headers={"Content-Type": "image/png", "X-API-Key": two}
            )
            assert answered.status_code == 200
        assert server.backend.budgets.requests.held[greedy.id] == 20
        time.sleep(1.1)
        _, _, body = open_.enter_context(connected(server.url, *lines)).answer()
        assert json.loads(body)["error"]["reason"] == "requests"


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
    features_bundle: Path, tmp_path: Path, hard: int, most: int, connected: Connect
) -> None:
    """S12: with `ulimit -n 256`, 230 idle connections made every new one end unread for 75 s, without a word."""
    with limited(features_bundle, tmp_path, 256, hard) as (url, log), ExitStack() as open_:
        for _ in range(most + 300 if hard == 256 else 400):
            open_.enter_context(connected(url))
        host = f"Host: {url.removeprefix('http://')}"
        found = b""
        for path in (*["/healthz/live"] * 20, "/v1/spaces", "/metrics"):
            with connected(url, f"GET {path} HTTP/1.1", host, "Connection: close", "") as there:
                status, _, found = there.answer()
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
