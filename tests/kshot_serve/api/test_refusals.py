"""What cannot be done is refused with a fixed code, and no refusal gives anything away."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kshot_serve.settings import Settings

Error = Callable[[httpx.Response], tuple[int, str]]  # of conftest.py, as the others here
Running = Any
Start = Callable[[Settings], AbstractContextManager[Running]]
JSON, TEXT, PNG = ({"Content-Type": kind} for kind in ("application/json", "text/plain", "image/png"))


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
    server: Running, method: str, path: str, sent: dict[str, Any], expected: tuple[int, str], error: Error
) -> None:
    assert error(server.http.request(method, path, **sent)) == expected


def test_a_method_that_is_not_taken_is_told_which_are(server: Running, space: str) -> None:
    """RFC 9110, 15.5.6; Schemathesis found that each path told the methods of its first route only."""
    refused = server.http.put(space)
    assert (refused.status_code, refused.headers["allow"]) == (405, "DELETE, GET, PATCH")


def test_a_refusal_never_repeats_what_came(server: Running, error: Error) -> None:
    refused = server.http.post("/v1/spaces", json={"name": {"secret-password": 1}, "<script>": 2})
    assert error(refused) == (400, "bad_request")
    assert "secret" not in refused.text
    assert "name" in refused.json()["error"]["message"]


def test_what_fails_inside_is_told_by_its_id_and_nothing_else(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Error
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
    features_bundle: Path, tmp_path: Path, running: Start, error: Error
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
