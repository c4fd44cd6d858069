"""Too much to do: a full queue, clients that hang up, answers that would come too late."""

from __future__ import annotations

import http.client
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from kshot_runtime.bundle import Graphs
from kshot_serve.settings import EngineSettings, Settings

Photo = Callable[..., bytes]
Until = Callable[..., None]  # of conftest.py
Error = Callable[[httpx.Response], tuple[int, str]]  # of conftest.py, as the others here
Running = Any
Start = Callable[[Settings], AbstractContextManager[Running]]
PNG = {"Content-Type": "image/png"}


def metric(server: Running, line: str) -> bool:
    return line in server.http.get("/metrics").text


def test_a_full_queue_refuses_before_it_reads_a_body(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo, until: Until
) -> None:
    """gh:triton-inference-server/server#6796: limits that did not hold; gh:bentoml/BentoML#2603: without a reason."""
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, engine=EngineSettings(queue=4, runners=1)
    )
    with running(settings) as server, held(server) as (entered, let), begun(server, PNG, photo("red", 2)) as early:
        until(lambda: server.backend.budgets.bodies.taken == early.half)  # while there was room in the queue
        first = asks(server, photo("red"))
        assert entered.wait(30)
        second = asks(server, photo("red", 1))
        until(lambda: metric(server, "kshot_queued_images 1.0"))
        complete = early.answer()
        assert (complete.status, b'"reason":"queue"' in complete.read()) == (429, True)
        host = server.url.removeprefix("http://")
        with socket.create_connection((host.split(":")[0], int(host.split(":")[1])), timeout=10) as third:
            started = time.perf_counter()
            head = (
                f"POST /v1/embed HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: 900000\r\n\r\n"
            )
            third.sendall(head.encode() + b"\x89PNG")
            head = third.recv(65536)  # no more than the first bytes of the body have been sent
            took = time.perf_counter() - started
            while not head.endswith(b"}"):
                head += third.recv(65536)
        assert b"429" in head.split(b"\r\n")[0]
        assert re.search(rb"retry-after: \d+", head)
        assert b'"reason":"queue"' in head
        assert took < 10  # and not the 30 s that a body may take
        let.set()
        assert [each.result().status_code for each in (first, second)] == [200, 200]


def test_a_client_that_hangs_up_leaves_the_queue(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo, until: Until
) -> None:
    """gh:ray-project/ray#41057: requests of clients that had gone still cost their time."""
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, engine=EngineSettings(runners=1)
    )
    with running(settings) as server, held(server) as (entered, let):
        first = asks(server, photo("red"))
        assert entered.wait(30)
        host = server.url.removeprefix("http://")
        body = photo("red", 1)
        with socket.create_connection((host.split(":")[0], int(host.split(":")[1])), timeout=10) as fickle:
            head = f"POST /v1/embed HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: {len(body)}"
            fickle.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: metric(server, "kshot_queued_images 1.0"))
        until(lambda: metric(server, 'route="POST /v1/embed",status="499"} 1.0'))
        let.set()
        assert first.result().status_code == 200
        until(lambda: metric(server, 'kshot_dropped_images_total{why="gone"} 1.0'))


def test_an_answer_that_would_come_too_late_is_given_up(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo, error: Error
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0)
    with running(settings) as server, held(server) as (_, let):
        late = server.http.post("/v1/embed", content=photo("red"), headers=PNG | {"x-kshot-deadline-ms": "50"})
        assert error(late) == (503, "too_late")
        assert "retry-after" in late.headers
        let.set()


def test_live_says_no_only_while_work_stands_still(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo, until: Until
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, stalled_s=0.2)
    with running(settings) as server, held(server) as (entered, let):
        live = lambda: server.http.get("/healthz/live")  # noqa: E731
        assert live().json() == {"status": "live", "reasons": []}
        first = asks(server, photo("red"))
        assert entered.wait(30)
        until(lambda: live().status_code == 503)
        why = "an image has been waiting, or running, for longer than any deadline"
        assert live().json() == {"status": "stalled", "reasons": [why]}
        assert server.http.get("/v2/health/live").status_code == 503
        let.set()
        first.result()
        until(lambda: live().status_code == 200)


def test_a_client_cannot_ask_for_more_time_than_the_server_gives(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo, error: Error
) -> None:
    engine = EngineSettings(deadline_s=0.2)
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, engine=engine)
    with running(settings) as server, held(server) as (_, let):
        late = server.http.post("/v1/embed", content=photo("red"), headers=PNG | {"x-kshot-deadline-ms": "60000"})
        assert error(late) == (503, "too_late")
        let.set()


def test_the_time_for_an_answer_begins_when_its_body_is_complete(
    server: Running, photo: Photo, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    started: list[float] = []
    deadline, bodies = server.backend.deadline, server.backend.budgets.bodies
    monkeypatch.setattr(
        server.backend, "deadline", lambda *asked: (started.append(time.monotonic()), deadline(*asked))[1]
    )
    for path, kind, body in (
        ("/v1/embed", "image/png", photo("red")),
        ("/v1/spaces/import", "application/zip", b"this is no zip"),
    ):
        started.clear()
        until(lambda: not bodies.taken)
        with begun(server, {"Content-Type": kind}, body, path) as early:
            until(lambda expected=early.half: bodies.taken == expected)
            assert not started
            assert early.answer().status in (200, 400)
        assert len(started) == 1


def test_a_write_that_has_begun_is_finished_though_its_client_hangs_up(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes to the database meanwhile, so that the write waits."""
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0)
    with running(settings) as server, closing(sqlite3.connect(tmp_path / "spaces.db", isolation_level=None)) as other:
        space = server.http.post("/v1/spaces", json={"name": "pets"}).json()["id"]
        writes, run_writing = threading.Event(), server.backend.store.run_writing

        def begins(*write: Any) -> Any:
            writes.set()
            return run_writing(*write)

        monkeypatch.setattr(server.backend.store, "run_writing", begins)
        other.execute("BEGIN IMMEDIATE")
        path, sent = f"/v1/spaces/{space}/classes", {"photos": ("photo", photo("red"))}
        form = httpx.Request("POST", server.url, data={"name": "red"}, files=sent)  # for its body
        with begun(server, {"Content-Type": form.headers["content-type"]}, form.read(), path) as fickle:
            fickle.send(fickle.rest)
            assert writes.wait(30)
        until(lambda: metric(server, 'route="POST /v1/spaces/{space_id}/classes",status="499"} 1.0'))
        assert server.http.get(path).json()["classes"] == []
        other.execute("ROLLBACK")
        until(lambda: [each["name"] for each in server.http.get(path).json()["classes"]] == ["red"])


class begun(http.client.HTTPConnection):  # noqa: N801  (a context manager)
    """A request of whose body a half was sent."""

    def __init__(self, server: Running, headers: dict[str, str], body: bytes, path: str = "/v1/embed") -> None:
        super().__init__(server.url.removeprefix("http://"), timeout=30)
        self.half, self.rest = len(body) // 2, body[len(body) // 2 :]
        self.putrequest("POST", path)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.putheader(name, value)
        self.endheaders(body[: self.half])

    def answer(self) -> http.client.HTTPResponse:
        """What comes once the other half is sent."""
        self.send(self.rest)
        return self.getresponse()

    def __enter__(self) -> begun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class held:  # noqa: N801  (a context manager)
    """The model stands still until told: (entered, let)."""

    def __init__(self, server: Running) -> None:
        self.graphs: Graphs = server.backend.champions.current.bundle.graphs
        self.entered, self.let = threading.Event(), threading.Event()

    def __enter__(self) -> tuple[threading.Event, threading.Event]:
        real = self.graphs.embed

        def embed(images: np.ndarray) -> np.ndarray:
            self.entered.set()
            assert self.let.wait(60)
            return real(images)

        self.graphs.embed = embed  # type: ignore[method-assign]
        return self.entered, self.let

    def __exit__(self, *_: object) -> None:
        self.let.set()
        del self.graphs.embed


class asks:  # noqa: N801  (reads as a sentence)
    """A request in a thread of its own."""

    def __init__(self, server: Running, photo: bytes) -> None:
        def ask() -> None:
            self.response = httpx.post(f"{server.url}/v1/embed", content=photo, headers=PNG, timeout=60)

        self.thread = threading.Thread(target=ask)
        self.thread.start()

    def result(self) -> httpx.Response:
        self.thread.join(60)
        return self.response
