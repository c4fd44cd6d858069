"""A label space with three colours, and what every refusal looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from kshot_serve import errors

Photo = Callable[..., bytes]
Running = Any  # of conftest.py


@pytest.fixture
def space(server: Running, photo: Photo, request: pytest.FixtureRequest) -> str:
    """The path of a label space with red, green and blue."""
    name = request.node.name[:150]
    path = "/v1/spaces/" + server.http.post("/v1/spaces", json={"name": name}).json()["id"]
    for colour in ("red", "green", "blue"):
        photos = [("photos", ("photo", photo(colour, shade))) for shade in range(2)]
        added = server.http.post(f"{path}/classes", data={"name": colour}, files=photos)
        assert added.status_code == 201, added.text
    return path


@pytest.fixture(scope="session")
def error() -> Callable[[httpx.Response], tuple[int, str]]:
    """error(response): status and code of a refusal, whose shape is looked at on the way."""

    def read(response: httpx.Response) -> tuple[int, str]:
        body = response.json()
        assert set(body) == {"error"}
        assert {"code", "message", "request_id"} <= set(body["error"])
        assert body["error"]["request_id"] == response.headers["x-request-id"]
        assert errors.STATUS[body["error"]["code"]] == response.status_code
        return response.status_code, body["error"]["code"]

    return read
