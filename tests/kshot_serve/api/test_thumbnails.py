"""What the page asks beyond the API's own needs: small pictures of photos, and the scope of its key."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kshot_serve.settings import Settings

Photo = Callable[..., bytes]
Running = Any  # of conftest.py
Start = Callable[[Settings], AbstractContextManager[Running]]


def added(server: Running, name: str, photo: bytes) -> str:
    """The path of a photo in a new label space."""
    space = "/v1/spaces/" + server.http.post("/v1/spaces", json={"name": name}).json()["id"]
    made = server.http.post(f"{space}/classes", data={"name": "red"}, files=[("photos", ("photo", photo))]).json()
    return f"{space}/photos/{made['photos'][0]}"


def test_a_thumbnail_is_a_small_upright_jpeg_without_metadata_that_a_browser_keeps(
    server: Running, photo: Photo
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    exif[0x010E] = "at home"
    green = np.full((100, 400, 3), (20, 200, 20), np.uint8)
    red, blue = (np.full((200, 400, 3), colour, np.uint8) for colour in ((230, 20, 20), (20, 20, 230)))
    file = io.BytesIO()  # red above blue as stored: upright, red is on the right
    Image.fromarray(np.concatenate([green, red, blue, green])).save(file, "JPEG", exif=exif)
    path = added(server, "thumbnails", file.getvalue())
    small = server.http.get(f"{path}/thumbnail")
    assert small.headers["content-type"] == "image/jpeg"
    assert small.headers["cache-control"] == "private, no-cache"
    assert len(small.content) < 6_000
    assert b"at home" not in small.content
    with Image.open(io.BytesIO(small.content)) as image:
        assert image.size == (160, 160)
        assert [np.argmax(image.getpixel((x, 80))) for x in (5, 40, 120, 155)] == [2, 2, 0, 0]
    for known in (small.headers["etag"], f'"another", W/{small.headers["etag"]}'):
        again = server.http.get(f"{path}/thumbnail", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", small.headers["etag"])
    assert server.http.get(path).headers["etag"] != small.headers["etag"]

    server.http.delete(path).raise_for_status()
    gone = server.http.get(f"{path}/thumbnail", headers={"If-None-Match": small.headers["etag"]})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "photo_unknown")


def test_a_photo_that_was_not_kept_has_a_thumbnail_of_what_the_model_sees(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, keep_photos=False)
    with running(settings) as server:
        small = server.http.get(f"{added(server, 'not kept', photo('red'))}/thumbnail")
        with Image.open(io.BytesIO(small.content)) as image:
            assert image.size == (160, 160)
            assert image.getpixel((80, 80))[0] > 200


def test_a_photo_is_not_read_again_for_a_client_that_has_it(
    server: Running, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = server.http.post("/v1/spaces", json={"name": "tags of photos"}).json()["id"]
    added = server.http.post(
        f"/v1/spaces/{space}/classes", data={"name": "red"}, files=[("photos", ("photo", photo("red")))]
    )
    path = f"/v1/spaces/{space}/photos/{added.json()['photos'][0]}"
    there = server.http.get(path)

    def read(*_: object) -> None:
        raise AssertionError("the photo was read")

    monkeypatch.setattr(server.backend.store, "photo", read)
    again = server.http.get(path, headers={"If-None-Match": there.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert server.http.get(path).status_code == 500


@pytest.mark.parametrize("scope", ["read", "write", "admin"])
def test_limits_say_what_the_key_may_do(
    features_bundle: Path, tmp_path: Path, running: Start, server: Running, scope: Any
) -> None:
    assert server.http.get("/v1/limits").json()["scope"] == "admin"  # no keys are needed here
    with running(Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, keys="required")) as locked:
        key = locked.backend.keys.new(scope, scope)[1]
        told = locked.http.get("/v1/limits", headers={"Authorization": f"Bearer {key}"}).json()
    assert told["scope"] == scope
