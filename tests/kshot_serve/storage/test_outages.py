"""A database that is away, and a disk that is full: what is still answered, what is said, and how it ends."""

from __future__ import annotations

import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

from kshot_serve.settings import Settings
from kshot_serve.storage.keys import Keys
from kshot_serve.storage.photo_keys import KeyChanges, PhotoKeys
from kshot_serve.storage.store import Store

Run = Callable[[Settings], AbstractContextManager[Any]]


class Wire:
    """A port of this machine that leads to Postgres' socket, until it is cut or says nothing any more."""

    def __init__(self, postgres: str) -> None:
        self._target = f"{parse_qs(urlsplit(postgres).query)['host'][0]}/.s.PGSQL.5432"
        self._flows = threading.Event()
        self._ends: list[socket.socket] = []
        self._port = 0
        self.restore()
        self.url = f"postgresql://kshot@127.0.0.1:{self._port}/postgres"

    def restore(self) -> None:
        self._flows.set()
        self._listener = socket.create_server(("127.0.0.1", self._port), reuse_port=True)
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Whoever calls is refused, and those who are there are hung up on."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def silence(self) -> None:
        self._flows.clear()

    def speak(self) -> None:
        self._flows.set()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                self._ends += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def wire(postgres: str) -> Iterator[Wire]:
    made = Wire(postgres)
    yield made
    made.speak()
    made.cut()


class Asker:
    """Requests with a key to one label space, made here, of one class."""

    def __init__(self, server: Any, photo: bytes) -> None:
        self._http, self._photo = server.http, photo
        self.keys = server.backend.keys
        self._headers = {"X-API-Key": self.keys.new("asker", "admin")[1]}
        self.space = self("POST", "/v1/spaces", json={"name": f"space {time.time_ns()}"}).json()["id"]
        self.path = f"/v1/spaces/{self.space}"
        assert self.add("red", photo).status_code == 201

    def __call__(self, method: str, path: str, **sent: Any) -> Any:
        return self._http.request(method, path, headers=self._headers | sent.pop("headers", {}), **sent)

    def add(self, name: str, photo: bytes) -> Any:
        return self("POST", f"{self.path}/classes", data={"name": name}, files=[("photos", ("photo", photo))])

    def classify(self) -> Any:
        return self("POST", f"{self.path}/classify", files={"photos": self._photo})

    def gauge(self, name: str) -> float:
        lines = self("GET", "/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def eventually(found: Callable[[], Any], wanted: Any, within_s: float = 15) -> None:
    until = time.monotonic() + within_s
    while (there := found()) != wanted and time.monotonic() < until:
        time.sleep(0.1)
    assert there == wanted


@pytest.mark.parametrize("how", ["refused", "silent"])
def test_while_postgres_is_away_questions_are_answered_from_the_last_known_revision(
    features_bundle: Path,
    tmp_path: Path,
    running: Run,
    postgres: str,
    wire: Wire,
    photo: Callable[..., bytes],
    how: str,
) -> None:
    """Found in review: 707 of 707 questions were refused, and the server called itself ready."""
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, database=wire.url, keys="required"
    )
    with running(settings) as server:
        ask = Asker(server, photo("red"))
        fresh = ask.classify().json()
        assert (fresh["stale"], fresh["revision"]) == (False, 2)
        never_asked = Asker(server, photo("red"))
        key, text = ask.keys.new("revoked meanwhile", "read")
        revoked = lambda: server.http.get("/v1/model", headers={"X-API-Key": text}).status_code  # noqa: E731
        assert revoked() == 200
        health = server.backend.store.health
        assert health.status == "ok"
        wire.cut() if how == "refused" else wire.silence()
        with closing(Store(postgres)) as elsewhere:
            Keys(elsewhere).revoke(key.id)
        took = []
        for _ in range(5):
            began = time.monotonic()
            found = ask.classify()
            took.append(time.monotonic() - began)
            assert found.status_code == 200
            assert {**found.json(), "request_id": "", "stale": False} == {**fresh, "request_id": ""}
            time.sleep(0.05)
        assert max(took) < 4
        assert how == "refused" or max(took) > 0.9
        eventually(lambda: ask.classify().json()["stale"], True)
        inputs = [{"name": "images", "datatype": "UINT8", "shape": [1, 3, 16, 16], "data": [0] * 768}]
        infer = ask("POST", f"/v2/models/{ask.space}/infer", json={"inputs": inputs})
        assert (infer.status_code, infer.headers["kshot-stale"]) == (200, "true")
        eventually(lambda: health.status, "away")
        eventually(lambda: ask.gauge("kshot_database_away"), 1.0)
        took = []
        for _ in range(5):
            began = time.monotonic()
            assert ask.classify().status_code == 200
            took.append(time.monotonic() - began)
        assert min(took) < 0.5
        time.sleep(5.1)  # as long as a key that was found is trusted without asking again
        assert ask.classify().json()["stale"] is True
        assert revoked() == 200
        assert ask("POST", "/v1/embed", files={"photos": photo("red")}).status_code == 200  # which needs no database
        stranger = server.http.get("/v1/model", headers={"X-API-Key": f"kshot_{'0' * 10}_{'0' * 64}"})
        assert (stranger.status_code, stranger.json()["error"]["code"]) == (503, "not_ready")
        if how == "refused":
            for refused in (
                ask.add("blue", photo("blue")),
                ask("GET", "/v1/spaces"),
                ask("GET", f"{ask.path}/export"),
                never_asked.classify(),
            ):
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
            wire.restore()
        else:
            wire.speak()
        eventually(lambda: ask.classify().json()["stale"], False)
        assert health.status == "ok"
        assert ask.gauge("kshot_database_away") == 0.0
        assert ask.add("green", photo("green")).status_code == 201
        assert ask.classify().json()["revision"] == 3
        eventually(revoked, 401)


def test_answers_without_the_database_end_after_a_while(
    features_bundle: Path, tmp_path: Path, running: Run, wire: Wire, photo: Callable[..., bytes]
) -> None:
    assert Settings.model_fields["stale_s"].default == 5 * 60
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, database=wire.url, keys="required", stale_s=1.5
    )
    with running(settings) as server:
        ask = Asker(server, photo("red"))
        ask.classify()
        wire.cut()
        time.sleep(0.1)
        assert ask.classify().json()["stale"] is True
        ready = server.http.get("/healthz/ready")
        assert (ready.status_code, ready.json()["reasons"]) == (200, ["the database does not answer"])
        eventually(lambda: ask.classify().status_code, 503)
        assert not server.backend.store.health.bridged
        ready = server.http.get("/healthz/ready")
        assert (ready.status_code, ready.json()["reasons"]) == (503, ["the database does not answer"])
        wire.restore()
        eventually(lambda: ask.classify().status_code, 200)


def test_while_the_photo_keys_are_away_questions_are_answered_and_nothing_is_half_deleted(
    features_bundle: Path, tmp_path: Path, running: Run, wire: Wire, photo: Callable[..., bytes]
) -> None:
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, keys="required", photo_keys=wire.url
    )
    with running(settings) as server:
        ask = Asker(server, photo("red"))
        assert ask.classify().status_code == 200
        [first] = ask("GET", f"{ask.path}/classes").json()["classes"]
        wire.cut()
        ready = lambda: ask("GET", "/healthz/ready")  # noqa: E731
        eventually(lambda: ready().json()["reasons"], ["the photo keys' database does not answer"])
        assert (ready().status_code, ask.gauge("kshot_database_away")) == (200, 1.0)
        assert (ask.classify().status_code, ask.classify().json()["stale"]) == (200, False)
        for refused in (
            ask.add("blue", photo("blue")),
            ask("DELETE", f"{ask.path}/classes/{first['id']}"),
            ask("GET", f"{ask.path}/photos/{first['photos'][0]['id']}"),
        ):
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (503, "not_ready")
            assert error["message"] == "the photo keys' database does not answer; try again"
        wire.restore()
        eventually(lambda: ready().json()["reasons"], [])
        assert ask.add("blue", photo("blue")).status_code == 201
        assert ask.classify().json()["revision"] == 3
        assert ask("DELETE", f"{ask.path}/classes/{first['id']}").json()["scrubbed"] is True


def test_keys_that_go_away_while_a_photo_is_deleted_are_destroyed_once_they_are_back(
    features_bundle: Path, tmp_path: Path, running: Run, wire: Wire, photo: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, keys="required", photo_keys=wire.url
    )
    settle = PhotoKeys.settle

    def cut_before_settling(keys: PhotoKeys, changes: KeyChanges) -> None:
        wire.cut()
        settle(keys, changes)

    with running(settings) as server:
        ask = Asker(server, photo("red"))
        [photos] = [each["photos"] for each in ask("GET", f"{ask.path}/classes").json()["classes"]]
        keys = server.backend.store._photo_keys
        assert len(keys.of([photos[0]["id"]])) == 1
        monkeypatch.setattr(PhotoKeys, "settle", cut_before_settling)
        deleted = ask("DELETE", f"{ask.path}/photos/{photos[0]['id']}")
        monkeypatch.undo()
        assert (deleted.status_code, deleted.json()["scrubbed"]) == (200, False)
        assert ask.gauge("kshot_unscrubbed_deletions") == 1.0
        wire.restore()
        eventually(lambda: ask.gauge("kshot_unscrubbed_deletions"), 0.0)
        assert keys.of([photos[0]["id"]]) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def noise(seed: int, tmp_path: Path) -> bytes:
    """A photo of 750 kB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (500, 500, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    return (tmp_path / "noise.png").read_bytes()


def pages(folder: Path) -> int:
    """Of which the database's file consists."""
    with closing(sqlite3.connect(folder / "spaces.db")) as database:
        return int(database.execute("PRAGMA page_count").fetchone()[0])


def test_a_deletion_that_is_larger_than_the_reserve_may_be_refused_and_smaller_ones_are_not(
    features_bundle: Path, tmp_path: Path, small_disk: Path, running: Run, photo: Callable[..., bytes]
) -> None:
    settings = Settings(
        source=str(features_bundle), folder=small_disk, port=0, leave_s=0, keys="required", reserve_mb=2
    )
    with running(settings) as server:
        ask = Asker(server, photo("red"))
        eventually(lambda: (small_disk / "spaces.db-reserve").exists(), True)
        files = [("photos", ("photo", noise(seed, tmp_path))) for seed in range(8)]
        large = ask("POST", f"{ask.path}/classes", data={"name": "large"}, files=files).json()
        [small] = ask.add("small", photo("blue")).json()["photos"]
        assert ask("DELETE", f"{ask.path}/photos/{small}").status_code == 200
        eventually(lambda: ask.gauge("kshot_unscrubbed_deletions"), 0.0)  # and SQLite's log is empty
        with closing((small_disk / "filler").open("wb")) as filler, suppress(OSError):
            filler.write(b"0" * 24_000_000)  # not a byte is left
        refused = ask("DELETE", f"{ask.path}/classes/{large['class']['id']}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
        for each in large["photos"]:
            assert ask("DELETE", f"{ask.path}/photos/{each}").status_code == 200
        assert ask.classify().status_code == 200


def test_a_full_disk_takes_deletions_and_recovers(
    features_bundle: Path, tmp_path: Path, small_disk: Path, running: Run, photo: Callable[..., bytes]
) -> None:
    """Found in review: 503 `not_ready` for ever, deletions too; ready all the while, and no metric."""
    settings = Settings(
        source=str(features_bundle), folder=small_disk, port=0, leave_s=0, keys="required", reserve_mb=8
    )
    with running(settings) as server:
        ask = Asker(server, photo("red"))
        health = server.backend.store.health
        eventually(lambda: (small_disk / "spaces.db-reserve").exists(), True)
        (small_disk / "other").write_bytes(b"0" * 3_000_000)
        photos = []
        for seed in range(30):
            added = ask.add(f"noise {seed}", noise(seed, tmp_path))
            if added.status_code != 201:
                break
            photos += added.json()["photos"]
        assert (added.status_code, added.json()["error"]["code"]) == (507, "storage_full")
        assert (health.status, ask.gauge("kshot_storage_full")) == ("full", 1.0)
        ready = server.http.get("/healthz/ready")
        assert (ready.status_code, ready.json()["reasons"]) == (200, ["the disk is full: only deletions are written"])
        with closing((small_disk / "filler").open("wb")) as filler, suppress(OSError):
            filler.write(b"0" * 24_000_000)  # not a byte is left
        assert ask.classify().status_code == 200
        assert ask.add("more", noise(99, tmp_path)).status_code == 507
        before = pages(small_disk)
        for gone in photos[:4]:
            assert ask("DELETE", f"{ask.path}/photos/{gone}").status_code == 200
        eventually(lambda: ask.gauge("kshot_unscrubbed_deletions"), 0.0)
        eventually(lambda: pages(small_disk) < before - 600, True)  # of 4096 bytes: three of four photos, at least
        eventually(lambda: (small_disk / "spaces.db-reserve").exists(), True)
        assert ask.add("in their place", noise(99, tmp_path)).status_code == 201
        assert health.status == "ok"
        for seed in range(100, 130):
            if ask.add(f"noise {seed}", noise(seed, tmp_path)).status_code == 507:
                break
        assert health.status == "full"
        (small_disk / "other").unlink()
        assert ask.add("after room was made", noise(98, tmp_path)).status_code == 201
        assert ask.gauge("kshot_storage_full") == 0.0
