"""What operators see of requests: traces, a log line, metrics, readiness."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import socket
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from kshot_serve.observe.logs import JsonLines
from kshot_serve.settings import Settings
from kshot_serve.spaces.service import Spaces

Photo = Callable[..., bytes]
Error = Callable[[httpx.Response], tuple[int, str]]  # of conftest.py, as the others here
Running = Any
Start = Callable[[Settings], AbstractContextManager[Running]]


def test_each_request_has_an_id_and_stays_in_its_callers_trace(server: Running) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    answer = server.http.get("/v2", headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
    assert re.fullmatch(f"00-{trace}-[0-9a-f]{{16}}-01", answer.headers["traceparent"])
    other = server.http.get("/v2", headers={"traceparent": "nonsense"})
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-00", other.headers["traceparent"])
    assert answer.headers["x-request-id"] != other.headers["x-request-id"]


def test_a_request_is_one_log_line_with_its_stages(
    server: Running, space: str, photo: Photo, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kshot.serve"):
        answer = server.http.post(f"{space}/classify", files=[("photos", ("photo", photo("red", 9)))])
        server.http.get("/v2")  # the line above is written after its answer is sent
    told = [getattr(record, "fields", {}) for record in caplog.records]
    [fields] = [each for each in told if each.get("route", "").endswith("classify")]
    assert fields["route"] == "POST /v1/spaces/{space_id}/classify"
    assert fields["status"] == answer.status_code == 200
    assert {"ms", "decode_ms", "queue_ms", "infer_ms", "decide_ms", "store_ms"} <= set(fields)


def test_the_id_of_a_refusal_is_that_of_its_log_line(
    server: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, until: Callable[..., None]
) -> None:
    monkeypatch.setattr(caplog.handler, "formatter", JsonLines())
    with caplog.at_level(logging.INFO, "kshot.serve"):
        refused = server.http.get("/v1/spaces/spc_unknown").json()["error"]
        until(lambda: refused["request_id"] in caplog.text)
    [line] = [each for each in map(json.loads, caplog.text.splitlines()) if each["request_id"] == refused["request_id"]]
    assert (line["status"], line["code"], refused["code"]) == (404, "space_unknown", "space_unknown")


def test_metrics_count_routes_and_never_paths_or_methods_that_a_client_made_up(
    server: Running, space: str, photo: Photo
) -> None:
    server.http.get(space)
    server.http.post(f"{space}/classify", files={"photos": photo("red")})
    server.http.get("/no/such/path")
    assert server.http.request("INVENTED", space).status_code == 400
    server.http.request("PURGE", space)
    exposed = server.http.get("/metrics").text
    assert 'route="GET /v1/spaces/{space_id}",status="200"' in exposed
    assert 'kshot_request_seconds_count{route="GET /v1/spaces/{space_id}"}' in exposed
    assert 'route="unmatched",status="404"' in exposed
    assert 'route="unmatched",status="405"' in exposed
    for made_up in ("such", "INVENTED", "PURGE", "spc_"):
        assert made_up not in exposed
    for stage in ("decode", "queue", "infer", "adapt", "decide", "store"):
        assert f'kshot_stage_seconds_count{{stage="{stage}"}}' in exposed
    assert "kshot_ready 1.0" in exposed


def test_runs_and_decisions_are_counted(server: Running, space: str, photo: Photo) -> None:
    names = ("kshot_batch_images_sum", "kshot_decisions_total")
    before = [server.metric(name) for name in names]
    asked = [("photos", ("photo", photo("red", shade))) for shade in range(3)]
    assert server.http.post(f"{space}/classify", files=asked).status_code == 200
    images, decisions = (server.metric(name) - then for name, then in zip(names, before, strict=True))
    assert (images >= 3, decisions) == (True, 3)


def test_the_log_holds_ids_and_neither_photos_nor_names_of_classes(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo, caplog: pytest.LogCaptureFixture, error: Error,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Found for this test: of a database that failed unexpectedly, it held the values that were to be written."""
    name, content = "Zwiebelfisch", photo("red")
    monkeypatch.setattr(caplog.handler, "formatter", JsonLines())
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, keys="required")
    with caplog.at_level(logging.INFO), running(settings) as server:
        key, text = server.backend.keys.new("shop", "write")
        server.http.headers["X-API-Key"] = text
        path = "/v1/spaces/" + server.http.post("/v1/spaces", json={"name": "fish"}).json()["id"]

        def add(named: str) -> httpx.Response:
            return server.http.post(f"{path}/classes", data={"name": named}, files=[("photos", (named, content))])

        class_ = add(name).json()["class"]["id"]
        assert add(name).status_code == 409
        assert server.http.patch(f"{path}/classes/{class_}", json={"name": f"{name} 2"}).status_code == 200
        assert server.http.post(f"{path}/classify", files={"photos": content}).status_code == 200
        assert server.http.post(f"{path}/classes", data={"name": name}, files={"photos": b"none"}).status_code == 422
        for table in ("classes", "contents"):
            with closing(sqlite3.connect(tmp_path / "spaces.db")) as database:
                database.execute(f"CREATE TRIGGER t BEFORE INSERT ON {table} BEGIN SELECT zeroblob(2000000000); END")
                assert error(add(f"{name} 3")) == (500, "internal")
                database.execute("DROP TRIGGER t")
    lines = caplog.text.splitlines()
    assert sum("DataError" in line for line in lines) == 2
    assert not [line for line in lines if name in line or "PNG" in line]
    told = [line for line in map(json.loads, lines) if line["message"] == "request"]
    assert {each["key"] for each in told} == {key.id}
    assert len({each["request_id"] for each in told}) == len({each["trace_id"] for each in told}) == len(told)


def test_ready_says_no_from_the_first_moment_of_the_end_while_requests_are_still_answered(
    features_bundle: Path, tmp_path: Path, running: Start
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=2)
    with running(settings) as server:
        server.server.handle_exit(signal.SIGTERM, None)
        ready = server.http.get("/healthz/ready")
        assert (ready.status_code, ready.json()["reasons"]) == (503, ["the server is stopping"])
        assert server.http.get("/v1/model").status_code == 200


def test_ready_says_no_until_the_model_is_warm(
    features_bundle: Path, tmp_path: Path, running: Start, monkeypatch: pytest.MonkeyPatch, error: Error
) -> None:
    """gh:triton-inference-server/server#6939, #7588: readiness was 200 while the model could not be used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked: dict[str, httpx.Response] = {}
    prepare_for = Spaces.prepare_for

    def ask() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
            for path in ("/healthz/live", "/healthz/ready", "/v2/health/ready", "/v1/model", "/v1/limits"):
                asked[path] = http.get(path)

    async def before(self: Spaces, champion: Any) -> None:
        await asyncio.to_thread(ask)
        await prepare_for(self, champion)

    monkeypatch.setattr(Spaces, "prepare_for", before)
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=port, leave_s=0)
    with running(settings) as server:
        assert [each.status_code for each in asked.values()] == [200, 503, 503, 503, 200]
        assert asked["/healthz/ready"].json() == {"status": "not ready", "reasons": ["no model is loaded yet"]}
        assert error(asked["/v1/model"]) == (503, "not_ready")
        assert "retry-after" in asked["/v1/model"].headers
        assert asked["/v1/limits"].json()["adaptation"] is None
        ready = server.http.get("/healthz/ready")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready", "reasons": []})
        assert server.http.get("/healthz/live").json() == {"status": "live", "reasons": []}
