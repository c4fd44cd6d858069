"""Pages of other origins can neither read nor write; the server's own page has a strict policy."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kshot_serve.settings import Settings

Photo = Callable[..., bytes]
Error = Callable[[httpx.Response], tuple[int, str]]  # of conftest.py, as the others here
Running = Any
Start = Callable[[Settings], AbstractContextManager[Running]]
PNG = {"Content-Type": "image/png"}


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "[::1].x"])
def test_a_foreign_name_in_host_is_refused(server: Running, host: str, error: Error) -> None:
    """CVE-2025-14279: DNS rebinding let any web page use a server on loopback."""
    assert error(server.http.get("/v1/spaces", headers={"Host": host})) == (421, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "192.168.1.7"])
def test_a_name_that_is_ours_and_any_address_are_taken(server: Running, host: str) -> None:
    """A rebinding page calls by its own name, and can never call by an address."""
    assert server.http.get("/v1/spaces", headers={"Host": host}).status_code == 200


def test_other_origins_are_let_in_only_where_they_are_named(
    server: Running, features_bundle: Path, tmp_path: Path, running: Start, error: Error
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
def test_a_page_from_elsewhere_cannot_write_blindly(
    server: Running, space: str, photo: Photo, origin: str, error: Error
) -> None:
    """Prefect GHSA-4hh5-2678-83fx: a form or a photo may be sent to any server on loopback without asking it first."""
    exported = server.http.get(f"{space}/export").content
    before = server.http.get("/v1/spaces").json()
    for path, body in (("/v1/spaces/import", exported), ("/v1/embed", photo("red"))):
        sent = server.http.post(path, content=body, headers={"Origin": origin, "Content-Type": "text/plain"})
        assert error(sent) == (403, "origin_not_allowed")
    assert server.http.get("/v1/spaces").json() == before
    own = server.http.post("/v1/embed", content=photo("red"), headers=PNG | {"Origin": server.url})
    assert own.status_code == 200


def test_behind_a_proxy_names_that_were_given_are_taken_and_forwarded_ones_ignored(
    features_bundle: Path, tmp_path: Path, running: Start
) -> None:
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, keys="required", hosts=("vision.example.com",)
    )
    with running(settings) as server:
        server.http.headers["X-API-Key"] = server.backend.keys.new("proxy", "read")[1]

        def ask(host: str, **more: str) -> int:
            forwarded = {f"X-Forwarded-{name}": value for name, value in more.items()}
            return server.http.get("/v1/spaces", headers={"Host": host} | forwarded).status_code

        assert [ask(host) for host in ("vision.example.com", "Vision.example.com:443", "localhost")] == [200] * 3
        assert ask("other.example.com") == ask("other.example.com", Host="vision.example.com") == 421
        assert ask("vision.example.com", Host="other.example.com", Proto="https") == 200
        asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
        for answer in (server.http.options("/v1/spaces", headers=asked), server.http.get("/v1/spaces", headers=asked)):
            assert "access-control-allow-origin" not in answer.headers
        server.backend.settings = settings.model_copy(update={"hosts": ()})
        assert ask("other.example.com") == 200


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
