"""The HTTP application as a whole: limits, the description, where it may listen."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kshot_serve import errors
from kshot_serve.api.app import create_app
from kshot_serve.settings import Settings

Photo = Callable[..., bytes]
Running = Any  # of conftest.py


def test_limits_are_told_before_they_are_met(server: Running) -> None:
    """gh:kserve/kserve#2810: payload limits that nobody documented."""
    limits = server.http.get("/v1/limits").json()
    assert limits["formats"] == ["jpeg", "png", "webp"]
    assert limits["photo"] == {
        "max_bytes": 20_000_000, "max_pixels": 25_000_000, "max_pixels_whole": 16_000_000,
        "max_side": 12_000, "max_aspect": 25.0, "min_side": 8,
    }  # fmt: skip
    assert limits["request"] == {"photos": 32, "bytes": 64_000_000}
    assert limits["adaptation"] == {"ways": 200, "shots": 100, "support": 2000}


def test_a_kept_connection_waits_for_no_acknowledgement(server: Running, photo: Photo) -> None:
    """Without TCP_NODELAY, an answer's second packet waits for the first to be acknowledged: 40 ms on Linux."""
    took = []
    for _ in range(20):
        started = time.perf_counter()
        server.http.post("/v1/embed", content=photo("red"), headers={"content-type": "image/png"})
        took.append(time.perf_counter() - started)
    assert min(took[10:]) < 0.035  # the first ones of a connection are acknowledged at once


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
