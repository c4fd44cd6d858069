"""The HTTP application: what it answers, in which words, and what it does not let itself be talked into."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import socket
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from kshot_runtime.bundle import Graphs
from kshot_serve import errors
from kshot_serve.api.app import create_app
from kshot_serve.settings import EngineSettings, Settings
from kshot_serve.spaces.service import Spaces

Photo = Callable[..., bytes]
Running = Any  # of conftest.py
Start = Callable[[Settings], AbstractContextManager[Running]]

JSON, TEXT, PNG = ({"Content-Type": kind} for kind in ("application/json", "text/plain", "image/png"))


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    given_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < given_up, "what was waited for did not come"
        time.sleep(0.005)


def metric(server: Running, line: str) -> bool:
    return line in server.http.get("/metrics").text


def files(*photos: bytes, field: str = "photos") -> list[tuple[str, tuple[str, bytes]]]:
    return [(field, ("photo", photo)) for photo in photos]


@pytest.fixture
def space(server: Running, photo: Photo, request: pytest.FixtureRequest) -> str:
    """The path of a label space with red, green and blue."""
    name = request.node.name[:150]
    path = "/v1/spaces/" + server.http.post("/v1/spaces", json={"name": name}).json()["id"]
    for colour in ("red", "green", "blue"):
        added = server.http.post(f"{path}/classes", data={"name": colour}, files=files(photo(colour), photo(colour, 1)))
        assert added.status_code == 201, added.text
    return path


def error(response: httpx.Response) -> tuple[int, str]:
    """Status and code of a refusal, whose shape is looked at on the way."""
    body = response.json()
    assert set(body) == {"error"}
    assert {"code", "message", "request_id"} <= set(body["error"])
    assert body["error"]["request_id"] == response.headers["x-request-id"]
    assert errors.STATUS[body["error"]["code"]] == response.status_code
    return response.status_code, body["error"]["code"]


# What it is for ----------------------------------------------------------------------------------------------------


def test_a_class_is_known_from_the_next_request_on(server: Running, space: str, photo: Photo) -> None:
    asked = files(photo("yellow", 7))
    assert server.http.post(f"{space}/classify", files=asked).json()["results"][0]["decision"] != "match"
    added = server.http.post(f"{space}/classes", data={"name": "yellow"}, files=files(photo("yellow")))
    assert added.status_code == 201
    assert added.json()["class"]["name"] == "yellow"
    answer = server.http.post(f"{space}/classify", files=asked).json()
    assert answer["revision"] == added.json()["revision"]
    assert answer["results"][0]["class"] == {"id": added.json()["class"]["id"], "name": "yellow"}
    assert answer["results"][0]["evidence"][0]["photo"] == added.json()["photos"][0]


def test_an_answer_says_what_gave_it(server: Running, space: str, photo: Photo) -> None:
    response = server.http.post(f"{space}/classify", files=files(photo("red", 5)))
    body, model = response.json(), server.http.get("/v1/model").json()
    assert body["model"] == {name: model[name] for name in ("name", "version", "bundle")}
    assert body["request_id"] == response.headers["x-request-id"]
    [result] = body["results"]
    assert result["classes"][0]["name"] == "red"
    assert 0 <= result["probability"] <= 1
    assert len(result["evidence"]) == 3


def test_a_photo_may_be_the_whole_body(server: Running, space: str, photo: Photo) -> None:
    """gh:kserve/kserve#2400: JSON and base64 make photos a third larger; bytes are taken as they are."""
    for kind in ("image/png", "image/jpeg", "application/octet-stream"):  # the bytes decide, not the word
        answer = server.http.post(f"{space}/classify", content=photo("green", 3), headers={"Content-Type": kind})
        assert answer.json()["results"][0]["class"]["name"] == "green"


def test_a_bad_photo_by_itself_is_refused_and_among_others_has_its_own_error(
    server: Running, space: str, photo: Photo
) -> None:
    """gh:Lightning-AI/LitServe#340: one bad item failed everybody in the batch."""
    assert error(server.http.post(f"{space}/classify", files=files(b"no photo"))) == (422, "not_an_image")
    answer = server.http.post(f"{space}/classify", files=files(photo("red", 4), b"no photo", photo("blue", 4)))
    assert answer.status_code == 200
    first, second, third = answer.json()["results"]
    assert [first["class"]["name"], third["class"]["name"]] == ["red", "blue"]
    assert second["error"]["code"] == "not_an_image"


def test_photos_are_added_all_or_none(server: Running, space: str, photo: Photo) -> None:
    before = server.http.get(f"{space}/classes").json()
    refused = server.http.post(
        f"{space}/classes", data={"name": "grey"}, files=files(photo("grey"), photo("grey", 1)[:200])
    )
    assert error(refused) == (422, "not_an_image")
    assert "photo 2" in refused.json()["error"]["message"]
    assert server.http.get(f"{space}/classes").json() == before


def test_a_deleted_photo_is_gone_and_a_rollback_says_so(server: Running, space: str, photo: Photo) -> None:
    listed = server.http.get(f"{space}/classes").json()
    [gone, *_] = [each["id"] for each in listed["classes"][0]["photos"]]
    there = server.http.get(f"{space}/photos/{gone}")
    assert there.content == photo("red")
    assert there.headers["content-type"] == "image/png"
    assert there.headers["cache-control"] == "private, no-cache"
    again = server.http.get(f"{space}/photos/{gone}", headers={"If-None-Match": there.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert server.http.delete(f"{space}/photos/{gone}").status_code == 200
    assert error(server.http.get(f"{space}/photos/{gone}")) == (404, "photo_unknown")
    back = server.http.post(f"{space}/rollback", json={"revision": listed["revision"]}).json()
    assert back["gone"] == [gone]
    assert back["revision"] == listed["revision"] + 2
    revisions = server.http.get(f"{space}/revisions").json()["revisions"]
    assert revisions[0]["action"] == "rollback"
    assert revisions[0]["to"] == listed["revision"]


def test_revisions_come_in_pages(server: Running, space: str) -> None:
    numbers, before = [], None
    while True:
        page = server.http.get(
            f"{space}/revisions", params={"limit": 3} | ({"before": before} if before else {})
        ).json()
        numbers += [each["number"] for each in page["revisions"]]
        if (before := page["next"]) is None:
            break
    assert numbers == [4, 3, 2, 1]


def test_a_label_space_travels_as_a_zip(server: Running, space: str, photo: Photo) -> None:
    exported = server.http.get(f"{space}/export")
    assert exported.headers["content-type"] == "application/zip"
    assert zipfile.ZipFile(io.BytesIO(exported.content)).testzip() is None
    made = server.http.post("/v1/spaces/import", content=exported.content, headers={"Content-Type": "application/zip"})
    assert made.status_code == 201
    answer = server.http.post(f"/v1/spaces/{made.json()['id']}/classify", files=files(photo("blue", 2))).json()
    assert answer["results"][0]["class"]["name"] == "blue"
    assert server.http.delete(f"/v1/spaces/{made.json()['id']}").json() == {"scrubbed": True}
    assert error(server.http.get(f"/v1/spaces/{made.json()['id']}")) == (404, "space_unknown")
    assert error(server.http.post("/v1/spaces/import", content=b"no zip")) == (400, "bad_request")


def test_a_label_space_is_renamed_and_its_strictness_set_and_set_back(server: Running, space: str) -> None:
    name = server.http.get(space).json()["name"] + " anew"
    changed = server.http.patch(space, json={"name": name, "accept": 0.8}).json()
    assert (changed["name"], changed["accept"], changed["accepted"]) == (name, 0.8, pytest.approx(0.8))
    assert 0 <= changed["false_accepts"] <= 1
    balanced = server.http.patch(space, json={"accept": None}).json()
    ways, photos = balanced["classes"], balanced["photos"]
    fit = server.backend.champions.current.bundle.manifest.calibration_for(ways, photos / ways)
    assert fit is not None
    assert [balanced[name] for name in ("accept", "accepted", "false_accepts")] == [
        None,
        fit.accepted,
        fit.false_accepts,
    ]
    assert error(server.http.patch(space, json={"name": None})) == (400, "bad_request")
    assert error(server.http.post("/v1/spaces", json={"name": name})) == (409, "conflict")


def test_a_class_is_renamed_filled_and_deleted(server: Running, space: str, photo: Photo) -> None:
    red = server.http.get(f"{space}/classes").json()["classes"][0]["id"]
    assert server.http.patch(f"{space}/classes/{red}", json={"name": "rot"}).status_code == 200
    added = server.http.post(f"{space}/classes/{red}/photos", files=files(photo("red", 8), photo("red")))
    assert added.json()["class"]["name"] == "rot"
    assert len(added.json()["photos"]) == 1
    assert any("already" in note for note in added.json()["notes"])
    assert server.http.delete(f"{space}/classes/{red}").status_code == 200
    assert [each["name"] for each in server.http.get(f"{space}/classes").json()["classes"]] == ["green", "blue"]
    assert error(server.http.delete(f"{space}/classes/{red}")) == (404, "class_unknown")


def test_photos_are_embedded_and_compared(server: Running, photo: Photo) -> None:
    embedded = server.http.post("/v1/embed", files=files(photo("red"), photo("blue"))).json()
    assert np.array(embedded["vectors"]).shape == (2, embedded["width"])
    pair = files(photo("red"), field="a") + files(photo("red", 1), field="b")
    assert server.http.post("/v1/verify", files=pair).json()["same"] is True
    assert error(server.http.post("/v1/verify", files=pair[:1])) == (422, "no_photos")
    assert error(server.http.post("/v1/verify", files=pair + pair)) == (422, "too_many_photos")


def test_label_spaces_are_listed_in_pages(server: Running) -> None:
    made = {server.http.post("/v1/spaces", json={"name": f"page {i}"}).json()["id"] for i in range(5)}
    found, after = [], ""
    while after is not None:
        page = server.http.get("/v1/spaces", params={"limit": 2, "after": after}).json()
        assert len(page["spaces"]) <= 2
        found += [space["id"] for space in page["spaces"]]
        after = page["next"]
    assert made <= set(found)
    assert len(found) == len(set(found))


# What it tells -----------------------------------------------------------------------------------------------------


def test_limits_are_told_before_they_are_met(server: Running) -> None:
    """gh:kserve/kserve#2810: payload limits that nobody documented."""
    limits = server.http.get("/v1/limits").json()
    assert limits["formats"] == ["jpeg", "png", "webp"]
    assert limits["photo"]["max_bytes"] == 20_000_000
    assert limits["request"] == {"photos": 32, "bytes": 64_000_000}
    assert limits["adaptation"]["ways"] == 200


def test_a_kept_connection_waits_for_no_acknowledgement(server: Running, photo: Photo) -> None:
    """Without TCP_NODELAY, an answer's second packet waits for the first to be acknowledged: 40 ms on Linux."""
    took = []
    for _ in range(20):
        started = time.perf_counter()
        server.http.post("/v1/embed", content=photo("red"), headers={"content-type": "image/png"})
        took.append(time.perf_counter() - started)
    assert min(took[10:]) < 0.035  # the first ones of a connection are acknowledged at once


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
        answer = server.http.post(f"{space}/classify", files=files(photo("red", 9)))
        server.http.get("/v2")  # the line above is written after its answer is sent
    told = [getattr(record, "fields", {}) for record in caplog.records]
    [fields] = [each for each in told if each.get("route", "").endswith("classify")]
    assert fields["route"] == "POST /v1/spaces/{space_id}/classify"
    assert fields["status"] == answer.status_code == 200
    assert {"ms", "decode_ms", "queue_ms", "infer_ms", "decide_ms", "store_ms"} <= set(fields)


def test_metrics_count_routes_and_never_paths_or_methods_that_a_client_made_up(server: Running, space: str) -> None:
    server.http.get(space)
    server.http.get("/no/such/path")
    assert server.http.request("INVENTED", space).status_code == 400
    server.http.request("PURGE", space)
    exposed = server.http.get("/metrics").text
    assert 'route="GET /v1/spaces/{space_id}",status="200"' in exposed
    assert 'route="unmatched",status="404"' in exposed
    assert 'route="unmatched",status="405"' in exposed
    for made_up in ("such", "INVENTED", "PURGE", "spc_"):
        assert made_up not in exposed
    for stage in ("decode", "queue", "infer", "adapt", "decide", "store"):
        assert f'kshot_stage_seconds_count{{stage="{stage}"}}' in exposed
    assert "kshot_ready 1.0" in exposed


def test_ready_says_no_until_the_model_is_warm(
    features_bundle: Path, tmp_path: Path, running: Start, monkeypatch: pytest.MonkeyPatch
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


# What it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "sent", "expected"),
    [
        ("GET", "/nothing", {}, (404, "not_found")),
        ("GET", "/v1/spaces/", {}, (404, "not_found")),
        ("GET", "/page/../app.py", {}, (404, "not_found")),
        ("GET", "/page/%2e%2e/app.py", {}, (404, "not_found")),
        ("GET", "/page/..%2fapp.py", {}, (404, "not_found")),
        ("PUT", "/v1/spaces", {}, (405, "method_not_allowed")),
        ("GET", "/v1/spaces/spc_unknown", {}, (404, "space_unknown")),
        ("GET", "/v1/spaces/%00", {}, (404, "space_unknown")),
        ("GET", "/v1/spaces?limit=0", {}, (400, "bad_request")),
        ("GET", "/v1/spaces?after=spc_'--", {}, (400, "bad_request")),
        ("POST", "/v1/spaces", {}, (400, "bad_request")),
        ("POST", "/v1/spaces", {"json": {"name": ""}}, (400, "bad_request")),
        ("POST", "/v1/spaces", {"json": {"name": "a\u0000b"}}, (400, "bad_request")),
        ("POST", "/v1/spaces", {"json": {"name": "x", "accept": 2}}, (400, "bad_request")),
        ("POST", "/v1/spaces", {"json": {"name": "x", "other": 2}}, (400, "bad_request")),
        ("POST", "/v1/spaces", {"json": [1]}, (400, "bad_request")),
        ("POST", "/v1/spaces", {"content": b"{", "headers": JSON}, (400, "bad_request")),
        (
            "POST", "/v1/spaces", {"content": b'{"name": "\\ud800"}', "headers": JSON},
            (400, "bad_request"),
        ),
        (
            "POST", "/v1/spaces", {"content": b"[" * 100_000, "headers": JSON},
            (400, "bad_request"),
        ),
        ("POST", "/v1/embed", {"content": b"x", "headers": TEXT}, (415, "media_type_unknown")),
        ("POST", "/v1/embed", {"json": {"url": "http://127.0.0.1/x.png"}}, (415, "media_type_unknown")),
        ("POST", "/v1/embed", {"content": b"", "headers": PNG}, (422, "no_photos")),
        (
            "POST", "/v1/embed", {"content": b"x", "headers": PNG | {"x-kshot-deadline-ms": "soon"}},
            (400, "bad_request"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_a_fixed_code(
    server: Running, method: str, path: str, sent: dict[str, Any], expected: tuple[int, str]
) -> None:
    assert error(server.http.request(method, path, **sent)) == expected


def test_a_method_that_is_not_taken_is_told_which_are(server: Running, space: str) -> None:
    """RFC 9110, 15.5.6; Schemathesis found that each path told the methods of its first route only."""
    refused = server.http.put(space)
    assert (refused.status_code, refused.headers["allow"]) == (405, "DELETE, GET, PATCH")


def test_a_refusal_never_repeats_what_came(server: Running) -> None:
    refused = server.http.post("/v1/spaces", json={"name": {"secret-password": 1}, "<script>": 2})
    assert error(refused) == (400, "bad_request")
    assert "secret" not in refused.text
    assert "name" in refused.json()["error"]["message"]


def test_what_fails_inside_is_told_by_its_id_and_nothing_else(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CVE-2026-22778: an error's text gave away an address."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("at 0x7f3a99 in /srv/models/secret.onnx")

    monkeypatch.setattr(server.backend.spaces, "list", fails)
    answer = server.http.get("/v1/spaces")
    assert error(answer) == (500, "internal")
    assert "0x" not in answer.text
    assert "/srv" not in answer.text
    [record] = [record for record in caplog.records if record.exc_info]
    assert "secret.onnx" in str(record.exc_info[1])


def test_a_body_is_bounded_by_what_it_says_and_by_what_comes(
    features_bundle: Path, tmp_path: Path, running: Start
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, body_mb=1)
    with running(settings) as server:
        too_much = b"x" * 1_000_001
        said = server.http.post("/v1/embed", content=too_much, headers=PNG)
        assert error(said) == (413, "body_too_large")
        chunks = (too_much[i : i + 65536] for i in range(0, len(too_much), 65536))
        chunked = server.http.post("/v1/embed", content=chunks, headers=PNG)
        assert error(chunked) == (413, "body_too_large")
        json_body = {"name": "x" * 1_000_001}
        assert error(server.http.post("/v1/spaces", json=json_body)) == (413, "body_too_large")
        assert error(server.http.post("/v1/spaces", content=iter([json.dumps(json_body).encode()]))) in (
            (413, "body_too_large"), (400, "bad_request"),
        )  # fmt: skip
        assert server.http.get("/v2").status_code == 200


def test_a_full_queue_refuses_before_it_reads_a_body(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo
) -> None:
    """gh:triton-inference-server/server#6796: limits that did not hold; gh:bentoml/BentoML#2603: without a reason."""
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, engine=EngineSettings(queue=4, runners=1)
    )
    with running(settings) as server, held(server) as (entered, let):
        first = asks(server, photo("red"))
        assert entered.wait(30)
        second = asks(server, photo("red", 1))
        until(lambda: metric(server, "kshot_queued_images 1.0"))
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
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo
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
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0)
    with running(settings) as server, held(server) as (_, let):
        late = server.http.post("/v1/embed", content=photo("red"), headers=PNG | {"x-kshot-deadline-ms": "50"})
        assert error(late) == (503, "too_late")
        assert "retry-after" in late.headers
        let.set()


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


# Browsers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "[::1].x"])
def test_a_foreign_name_in_host_is_refused(server: Running, host: str) -> None:
    """CVE-2025-14279: DNS rebinding let any web page use a server on loopback."""
    assert error(server.http.get("/v1/spaces", headers={"Host": host})) == (421, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "192.168.1.7"])
def test_a_name_that_is_ours_and_any_address_are_taken(server: Running, host: str) -> None:
    """A rebinding page calls by its own name, and can never call by an address."""
    assert server.http.get("/v1/spaces", headers={"Host": host}).status_code == 200


def test_other_origins_are_let_in_only_where_they_are_named(
    server: Running, features_bundle: Path, tmp_path: Path, running: Start
) -> None:
    asked = {"Origin": "https://shop.example"}
    refused = server.http.get("/v1/spaces", headers=asked)
    assert error(refused) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in refused.headers
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, origins=("https://shop.example",)
    )
    with running(settings) as named:
        there = named.http.get("/v1/nothing", headers=asked)
        assert there.headers["access-control-allow-origin"] == "https://shop.example"
        other = named.http.get("/v1/spaces", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        before = named.http.options("/v1/spaces", headers=asked | {"Access-Control-Request-Method": "POST"})
        assert before.status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "file://", "http://[", ""])
def test_a_page_from_elsewhere_cannot_write_blindly(server: Running, space: str, photo: Photo, origin: str) -> None:
    """Prefect GHSA-4hh5-2678-83fx: a form or a photo may be sent to any server on loopback without asking it first."""
    exported = server.http.get(f"{space}/export").content
    before = server.http.get("/v1/spaces").json()
    for path, body in (("/v1/spaces/import", exported), ("/v1/embed", photo("red"))):
        sent = server.http.post(path, content=body, headers={"Origin": origin, "Content-Type": "text/plain"})
        assert error(sent) == (403, "origin_not_allowed")
    assert server.http.get("/v1/spaces").json() == before
    own = server.http.post("/v1/embed", content=photo("red"), headers=PNG | {"Origin": server.url})
    assert own.status_code == 200


def test_the_page_and_its_files_come_with_a_strict_policy(server: Running) -> None:
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "camera=(self)" in page.headers["permissions-policy"]
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
        there = server.http.get(path)
        assert there.status_code == 200, path
        again = server.http.get(path, headers={"If-None-Match": there.headers["etag"]})
        assert again.status_code == 304
    assert page.headers["cross-origin-resource-policy"] == "same-origin"
    answer = server.http.get("/v1/spaces")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "server" not in answer.headers


@pytest.mark.parametrize("path", ["/", "/docs", "/healthz/live", "/healthz/ready", "/metrics"])
def test_head_is_answered_as_get_without_a_body(server: Running, path: str) -> None:
    """Uptime checkers ask so."""
    head, get = server.http.head(path), server.http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_the_description_has_every_code_scope_and_an_example(server: Running) -> None:
    described = server.http.get("/openapi.json").json()
    operations = [
        (path, method, operation) for path, each in described["paths"].items() for method, operation in each.items()
    ]
    told = set()
    for path, method, operation in operations:
        statuses = set(operation["responses"])
        assert {"400", "401", "403", "421", "500", "503"} <= statuses, (path, method)
        assert operation["x-kshot-scope"] in ("read", "write", "admin")
        assert "HTTPValidationError" not in str(operation)
        for response in operation["responses"].values():
            told |= set(response["description"].split(", "))
    assert set(errors.STATUS) - told <= {"method_not_allowed", "not_found"}
    classify = described["paths"]["/v1/spaces/{space_id}/classify"]["post"]
    single = {"application/octet-stream", "image/jpeg", "image/png", "image/webp"}
    assert set(classify["requestBody"]["content"]) == single | {"multipart/form-data"}
    assert described["components"]["schemas"]["Classified"]["examples"]


def test_nothing_is_served_beyond_this_machine_without_keys_by_mistake(features_bundle: Path, tmp_path: Path) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, host="0.0.0.0", keys="off")
    with pytest.raises(Exception, match="--exposed"):
        create_app(settings)
    create_app(settings.model_copy(update={"exposed": True})).state.backend.store.close()
