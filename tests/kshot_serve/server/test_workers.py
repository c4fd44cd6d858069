"""Several workers behind one port, as `kshot serve --workers` starts them: to clients they are one server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from kshot_serve.settings import Settings

Photo = Callable[..., bytes]
Until = Callable[..., None]  # of conftest.py

KSHOT = Path(sys.executable).with_name("kshot")


@dataclass(frozen=True)
class Served:
    url: str
    process: subprocess.Popen[str]
    log: Path

    def workers(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return sorted(int(child) for task in tasks for child in task.read_text().split())

    def once(self, method: str, path: str, **sent: object) -> httpx.Response:
        """By a connection of its own, which any of the workers may get.

        Without `verify`, since httpx would read the system's certificates each time, for longer than the request takes.
        """
        return httpx.request(method, self.url + path, timeout=60, verify=False, **sent)  # type: ignore[arg-type]

    def metric(self, name: str) -> float:
        lines = self.once("GET", "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextmanager
def serving(bundle: Path, folder: Path, workers: int = 2) -> Iterator[Served]:
    log = folder / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [KSHOT, "serve", bundle, "--workers", str(workers), "--port", "0", "--folder", folder],
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, log.read_text()
        assert (" by 2 workers" in line) == (workers == 2)
        yield Served(line.split()[-1], process, log)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def served(features_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(features_bundle, tmp_path_factory.mktemp("workers")) as running:
        yield running


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def sockets(pid: int) -> int:
    names = (os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink())
    return sum(name.startswith("socket:") for name in names)


def test_connections_are_dealt_out_among_the_workers(served: Served, until: Until) -> None:
    before = [sockets(pid) for pid in served.workers()]
    address = ("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
    kept = [socket.create_connection(address, timeout=10) for _ in range(40)]
    try:
        until(lambda: sum(map(sockets, served.workers())) - sum(before) == 40)
        assert all(now > then for now, then in zip(map(sockets, served.workers()), before, strict=True))
    finally:
        for each in kept:
            each.close()


def test_a_kept_connection_stays_with_one_worker_whose_own_the_statistics_are(served: Served, until: Until) -> None:
    images = {"name": "images", "datatype": "UINT8", "shape": [1, 3, 16, 16], "data": [0] * 768}

    def counted(answer: httpx.Response) -> int:
        return int(answer.json()["model_stats"][0]["inference_count"])

    with httpx.Client(base_url=served.url, timeout=60) as kept:
        for number in range(1, 6):
            assert kept.post("/v2/models/embed/infer", json={"inputs": [images]}).status_code == 200
            assert counted(kept.get("/v2/models/embed/stats")) == number
    until(lambda: counted(served.once("GET", "/v2/models/embed/stats")) == 0)


def test_what_one_worker_has_learnt_the_others_know_at_once(served: Served, photo: Photo) -> None:
    space = served.once("POST", "/v1/spaces", json={"name": "colours"}).json()["id"]
    known = []
    for colour in ("red", "green", "blue"):
        files = [("photos", ("photo", photo(colour, shade))) for shade in range(2)]
        made = served.once("POST", f"/v1/spaces/{space}/classes", data={"name": colour}, files=files)
        assert made.status_code == 201
        known.append(colour)
        for each in known if len(known) > 1 else ():
            for shade in range(4):
                asked = served.once("POST", f"/v1/spaces/{space}/classify", files={"photos": photo(each, 9 + shade)})
                [found] = asked.json()["results"]
                assert found["classes"][0]["name"] == each


def test_writes_through_all_workers_at_once_are_all_there(served: Served) -> None:
    with ThreadPoolExecutor(8) as many:
        made = list(many.map(lambda i: served.once("POST", "/v1/spaces", json={"name": f"space {i}"}), range(40)))
    assert {each.status_code for each in made} == {201}
    listed = {each["name"] for each in served.once("GET", "/v1/spaces?limit=1000").json()["spaces"]}
    assert {f"space {i}" for i in range(40)} <= listed


def test_any_worker_tells_the_metrics_of_all(served: Served) -> None:
    route = 'kshot_requests_total{route="GET /v1/model",status="200"}'
    before = served.metric(route)
    for _ in range(20):
        served.once("GET", "/v1/model")
    assert [served.metric(route) - before for _ in range(6)] == [20.0] * 6
    assert served.metric("kshot_ready") == 1.0


def test_log_lines_of_workers_do_not_mix(served: Served, until: Until) -> None:
    with ThreadPoolExecutor(8) as many:
        list(many.map(lambda _: served.once("GET", "/v1/model"), range(200)))
    until(lambda: sum(line.get("route") == "GET /v1/model" for line in served.lines()) >= 200)


def test_a_worker_that_dies_is_replaced_and_the_others_go_on(
    features_bundle: Path, tmp_path: Path, until: Until
) -> None:
    with serving(features_bundle, tmp_path) as served:
        victim, other = served.workers()
        os.kill(victim, signal.SIGKILL)
        until(lambda: gone(victim))
        until(lambda: other in (now := served.workers()) and victim not in now and len(now) == 2)
        until(lambda: {served.once("GET", "/v1/model").status_code for _ in range(20)} == {200})
        until(lambda: served.metric("kshot_champion_swaps_total") == 3.0)
        [told] = [line for line in served.lines() if line["level"] == "error"]
        assert told["message"] == f"worker {victim} ended with -9; another takes its place"
        served.process.send_signal(signal.SIGTERM)
        workers = served.workers()
        assert served.process.wait(30) == 0
        assert all(map(gone, workers))


@dataclass
class Heard:
    """What clients were answered, by connections that they keep; what was no answer, they ask again."""

    statuses: list[int]
    errors: list[httpx.TransportError]
    stop: threading.Event


@contextmanager
def asked(
    url: str, until: Until, ask: Callable[[httpx.Client], httpx.Response] = lambda http: http.get("/v1/model")
) -> Iterator[Heard]:
    """Eight clients that ask without a pause; the block begins when each has been answered a few times."""
    heard = Heard([], [], threading.Event())

    def client(_: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            while not heard.stop.is_set():
                try:
                    heard.statuses.append(ask(http).status_code)
                except httpx.ConnectError:  # nobody listens any more
                    return
                except httpx.TransportError as error:
                    heard.errors.append(error)

    with ThreadPoolExecutor(8) as many:
        running = many.map(client, range(8))
        try:
            until(lambda: len(heard.statuses) >= 32)
            yield heard
        finally:
            heard.stop.set()
            list(running)


def test_clients_of_a_worker_that_is_killed_lose_their_connections_and_nothing_else(
    features_bundle: Path, tmp_path: Path, until: Until
) -> None:
    """B3: 30 x 503 `not_ready` from the replacement, which took connections before it had a model."""
    with serving(features_bundle, tmp_path) as served, asked(served.url, until) as heard:
        victim, other = served.workers()
        os.kill(victim, signal.SIGKILL)
        until(lambda: served.once("GET", "/v1/model").status_code == 200)
        until(lambda: len(served.workers()) == 2 and served.metric("kshot_champion_swaps_total") == 3.0)
        until(lambda: sockets(next(pid for pid in served.workers() if pid != other)) > 0)
        before = len(heard.statuses)
        until(lambda: len(heard.statuses) > before + 100)
    assert set(heard.statuses) == {200}
    assert len(heard.errors) <= 8  # each client had one connection


@pytest.mark.parametrize("workers", [1, 2])
def test_no_client_reads_an_error_while_the_server_ends(
    features_bundle: Path, tmp_path: Path, workers: int, until: Until
) -> None:
    """B13: up to 2 of 900 did, at the end of the leaving second: connections were closed that had just been made."""
    with serving(features_bundle, tmp_path, workers) as served, asked(served.url, until) as heard:
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0
    assert heard.errors == []
    assert set(heard.statuses) <= {200, 503}


def test_a_server_that_ends_under_load_answers_every_request_that_it_accepted(
    features_bundle: Path, tmp_path: Path, photo: Photo, until: Until
) -> None:
    photos = [("photos", ("photo", photo("red", shade, size=(200, 150)))) for shade in range(4)]
    with (
        serving(features_bundle, tmp_path, workers=1) as served,
        asked(served.url, until, lambda http: http.post("/v1/embed", files=photos)) as heard,
    ):
        before, told = len(heard.statuses), time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0
        assert [Settings.model_fields[name].default for name in ("leave_s", "drain_s")] == [1, 25]
        assert time.monotonic() - told < 25
    assert heard.errors == []
    assert set(heard.statuses) <= {200, 503}
    assert 200 in heard.statuses[before:]
    done = [line for line in served.lines() if (line.get("route"), line.get("status")) == ("POST /v1/embed", 200)]
    assert len(done) == heard.statuses.count(200)


def test_one_that_cannot_start_is_tried_again_and_does_not_count(
    features_bundle: Path, tmp_path: Path, until: Until
) -> None:
    """Seen in review: its gauge of readiness, 0, was among those of all from then on."""
    bundle = tmp_path / "bundle"
    shutil.copytree(features_bundle, bundle)
    with serving(bundle, tmp_path) as served:
        victim, other = served.workers()
        bundle.rename(tmp_path / "away")
        os.kill(victim, signal.SIGKILL)
        until(lambda: any("it does not start: there is no bundle" in str(line["message"]) for line in served.lines()))
        assert served.once("GET", "/v1/model").status_code == 200
        (tmp_path / "away").rename(bundle)
        until(lambda: len(served.workers()) == 2 and served.metric("kshot_champion_swaps_total") == 3.0)
        assert served.metric("kshot_ready") == 1.0
        assert other in served.workers()


def test_workers_end_with_a_parent_that_was_killed(features_bundle: Path, tmp_path: Path, until: Until) -> None:
    with serving(features_bundle, tmp_path) as served:
        workers = served.workers()
        served.process.kill()
        until(lambda: all(map(gone, workers)), 30)


def test_what_is_wrong_is_told_once(features_bundle: Path, tmp_path: Path) -> None:
    def said(bundle: Path, *options: str) -> str:
        command = [KSHOT, "serve", bundle, "--workers", "3", "--folder", tmp_path / "serve", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        [line] = [line for line in done.stderr.splitlines() if not line.startswith("{")]
        return line

    assert said(tmp_path / "none", "--port", "0").startswith("there is no bundle at ")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert said(features_bundle, "--port", str(port)).startswith(f"cannot serve at 127.0.0.1 port {port}: ")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_still_waits_for_its_model_ends_when_it_is_told(
    tmp_path: Path, workers: int, how: signal.Signals
) -> None:
    """Seen in review: neither was heard before the model was loaded, or the registry had answered."""
    with socket.create_server(("127.0.0.1", 0)) as registry:  # which takes a request, and never answers
        registry.settimeout(60)
        process = subprocess.Popen(
            [KSHOT, "serve", "models:/toy@production", "--workers", str(workers), "--port", "0", "--folder", tmp_path],
            env=os.environ | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{registry.getsockname()[1]}"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        asking, _ = registry.accept()
        with asking:
            started = time.monotonic()
            process.send_signal(how)
            out, errors = process.communicate(timeout=30)
            assert (process.returncode, out) == (0, ""), errors
            assert time.monotonic() - started < 6
            assert "Traceback" not in errors


def test_a_server_ends_in_time_though_a_class_is_still_being_adapted_to(
    features_bundle: Path, tmp_path: Path, photo: Photo
) -> None:
    program = f"""
import threading
from pathlib import Path
from kshot_runtime.bundle import Graphs
from kshot_serve.server.run import serve
from kshot_serve.settings import Settings

def stand(*_):
    print("it adapts", flush=True)
    threading.Event().wait()

def told(line):
    Graphs.adapt = stand
    print(line, flush=True)

settings = Settings(source={str(features_bundle)!r}, folder=Path({str(tmp_path)!r}), port=0, drain_s=1, leave_s=0)
serve(settings, told)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with httpx.Client(base_url=url, timeout=60) as http:
            path = "/v1/spaces/" + http.post("/v1/spaces", json={"name": "colours"}).json()["id"]
            http.post(f"{path}/classes", data={"name": "red"}, files={"photos": photo("red")}).raise_for_status()
            late = http.post(f"{path}/classify", files={"photos": photo("red")}, headers={"x-kshot-deadline-ms": "100"})
            assert late.status_code == 503
            assert process.stdout.readline() == "it adapts\n"
        process.terminate()
        _, errors = process.communicate(timeout=15)
        assert process.returncode == 0, errors
    finally:
        process.kill()
        process.communicate()
