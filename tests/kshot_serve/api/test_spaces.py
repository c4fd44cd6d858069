"""/v1: label spaces, their classes and photos, and questions to them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

Photo = Callable[..., bytes]
Error = Callable[[httpx.Response], tuple[int, str]]  # of conftest.py, as the others here
Running = Any
JSON = {"Content-Type": "application/json"}


def files(*photos: bytes, field: str = "photos") -> list[tuple[str, tuple[str, bytes]]]:
    return [(field, ("photo", photo)) for photo in photos]


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
    [strange] = server.http.post(f"{space}/classify", files=files(photo("black", 5))).json()["results"]
    assert (strange["decision"], strange["class"]) == ("unknown", None)
    assert {each["name"] for each in strange["classes"]} == {"red", "green", "blue"}


def test_a_photo_may_be_the_whole_body(server: Running, space: str, photo: Photo) -> None:
    """gh:kserve/kserve#2400: JSON and base64 make photos a third larger; bytes are taken as they are."""
    for kind in ("image/png", "image/jpeg", "application/octet-stream"):  # the bytes decide, not the word
        answer = server.http.post(f"{space}/classify", content=photo("green", 3), headers={"Content-Type": kind})
        assert answer.json()["results"][0]["class"]["name"] == "green"


def test_a_bad_photo_by_itself_is_refused_and_among_others_has_its_own_error(
    server: Running, space: str, photo: Photo, error: Error
) -> None:
    """gh:Lightning-AI/LitServe#340: one bad item failed everybody in the batch."""
    assert error(server.http.post(f"{space}/classify", files=files(b"no photo"))) == (422, "not_an_image")
    answer = server.http.post(f"{space}/classify", files=files(photo("red", 4), b"no photo", photo("blue", 4)))
    assert answer.status_code == 200
    first, second, third = answer.json()["results"]
    assert [first["class"]["name"], third["class"]["name"]] == ["red", "blue"]
    assert second["error"]["code"] == "not_an_image"


def test_photos_are_added_all_or_none(server: Running, space: str, photo: Photo, error: Error) -> None:
    before = server.http.get(f"{space}/classes").json()
    refused = server.http.post(
        f"{space}/classes", data={"name": "grey"}, files=files(photo("grey"), photo("grey", 1)[:200])
    )
    assert error(refused) == (422, "not_an_image")
    assert "photo 2" in refused.json()["error"]["message"]
    assert error(server.http.post(f"{space}/classes", files={"name": (None, "grey")})) == (422, "no_photos")
    assert server.http.get(f"{space}/classes").json() == before


def test_a_deleted_photo_is_gone_and_a_rollback_says_so(
    server: Running, space: str, photo: Photo, error: Error
) -> None:
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


def test_a_label_space_travels_as_a_zip(server: Running, space: str, photo: Photo, error: Error) -> None:
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


def test_a_label_space_is_renamed_and_its_strictness_set_and_set_back(
    server: Running, space: str, error: Error
) -> None:
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


def test_a_class_is_renamed_filled_and_deleted(server: Running, space: str, photo: Photo, error: Error) -> None:
    red = server.http.get(f"{space}/classes").json()["classes"][0]["id"]
    assert server.http.patch(f"{space}/classes/{red}", json={"name": "rot"}).status_code == 200
    added = server.http.post(f"{space}/classes/{red}/photos", files=files(photo("red", 8), photo("red")))
    assert added.json()["class"]["name"] == "rot"
    assert len(added.json()["photos"]) == 1
    assert any("already" in note for note in added.json()["notes"])
    assert server.http.delete(f"{space}/classes/{red}").status_code == 200
    assert [each["name"] for each in server.http.get(f"{space}/classes").json()["classes"]] == ["green", "blue"]
    assert error(server.http.delete(f"{space}/classes/{red}")) == (404, "class_unknown")


def test_photos_are_embedded_and_compared(server: Running, photo: Photo, error: Error) -> None:
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
