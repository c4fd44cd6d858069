"""Triton's own client and its extensions of the protocol: configuration, index, statistics, compressed bodies."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

Photo = Callable[..., bytes]
Running = Any  # of conftest.py


@pytest.fixture
def triton(server: Running) -> Iterator[InferenceServerClient]:
    client = InferenceServerClient(server.url.removeprefix("http://"))
    yield client
    client.close()


@pytest.fixture
def space(server: Running, photo: Photo, request: pytest.FixtureRequest) -> str:
    space = server.http.post("/v1/spaces", json={"name": request.node.name[:150]}).json()["id"]
    for colour in ("red", "blue"):
        photos = [("photos", ("photo", photo(colour)))]
        server.http.post(f"/v1/spaces/{space}/classes", data={"name": colour}, files=photos).raise_for_status()
    return space


def all_given_back(server: Running) -> None:
    """What a request held is given back soon after its answer."""
    given_up = time.monotonic() + 10
    while server.backend.budgets.bodies.taken:
        assert time.monotonic() < given_up
        time.sleep(0.01)


def photos(*contents: bytes) -> InferInput:
    given = InferInput("photos", [len(contents)], "BYTES")
    given.set_data_from_numpy(np.array(contents, dtype=object))
    return given


def test_the_index_lists_label_spaces_and_whether_they_can_be_asked(
    triton: InferenceServerClient, server: Running, space: str
) -> None:
    empty = server.http.post("/v1/spaces", json={"name": "empty for the index"}).json()["id"]
    index = {each["name"]: each for each in triton.get_model_repository_index()}
    assert index["embed"]["state"] == index[space]["state"] == "READY"
    assert index[space]["version"] == triton.get_model_metadata(space)["versions"][0]
    assert (index[empty]["state"], index[empty]["reason"]) == ("UNAVAILABLE", "the label space has no classes")
    ready = server.http.post("/v2/repository/index", json={"ready": True}).json()
    assert empty not in {each["name"] for each in ready}


def test_a_label_space_is_a_model_at_its_revision_in_json_too_and_embed_gives_features(
    triton: InferenceServerClient, server: Running, space: str, photo: Photo
) -> None:
    given = photos(photo("red", 1))
    asked = {"name": "photos", "datatype": "BYTES", "shape": [1], "data": [b64encode(photo("red", 1)).decode()]}
    answer = server.http.post(f"/v2/models/{space}/infer", json={"inputs": [asked]}).json()
    revision = server.http.get(f"/v1/spaces/{space}").json()["revision"]
    assert (answer["model_name"], answer["model_version"]) == (space, str(revision))
    outputs = {each["name"]: each["data"] for each in answer["outputs"]}
    assert outputs["class"] == ["red"]
    np.testing.assert_allclose(triton.infer(space, [given]).as_numpy("probability"), outputs["probability"], atol=1e-5)
    expected = server.http.post("/v1/embed", content=photo("red", 1), headers={"Content-Type": "image/png"}).json()
    np.testing.assert_allclose(triton.infer("embed", [given]).as_numpy("vectors"), expected["vectors"], atol=1e-5)


def test_models_are_neither_loaded_nor_unloaded(triton: InferenceServerClient, space: str) -> None:
    for change in (triton.load_model, triton.unload_model):
        with pytest.raises(InferenceServerException, match="there is nothing at this path"):
            change(space)
    assert triton.is_model_ready(space)


def test_a_configuration_has_the_tensors_of_the_metadata(triton: InferenceServerClient, space: str) -> None:
    config, metadata = triton.get_model_config(space), triton.get_model_metadata(space)
    assert [each["name"] for each in config["output"]] == [each["name"] for each in metadata["outputs"]]
    assert {each["name"] for each in config["output"]} == {"class", "probability", "decision", "logits", "classes"}
    assert config["input"][0] == {"name": "photos", "data_type": "TYPE_STRING", "dims": [-1]}
    assert config["input"][1]["data_type"] == "TYPE_UINT8"
    assert config["max_batch_size"] == 0
    with pytest.raises(InferenceServerException, match="another version"):
        triton.get_model_config(space, "99")


def test_statistics_count_requests_images_and_time(triton: InferenceServerClient, space: str, photo: Photo) -> None:
    before = time.time() * 1000
    triton.infer(space, [photos(photo("red", 1), photo("blue", 1))])
    with pytest.raises(InferenceServerException, match="not an image"):
        triton.infer(space, [photos(b"no photo")])
    [stats] = triton.get_inference_statistics(space)["model_stats"]
    assert stats["inference_count"] == 2
    assert before - 1 <= stats["last_inference"] <= time.time() * 1000
    figures = stats["inference_stats"]
    assert (figures["success"]["count"], figures["fail"]["count"]) == (1, 1)
    parts = [figures[name]["ns"] for name in ("queue", "compute_input", "compute_infer", "compute_output")]
    assert all(parts[1:])
    assert space in {each["name"] for each in triton.get_inference_statistics()["model_stats"]}


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_are_inflated(
    triton: InferenceServerClient, space: str, photo: Photo, algorithm: str
) -> None:
    answer = triton.infer(space, [photos(photo("red", 1))], request_compression_algorithm=algorithm)
    assert answer.as_numpy("class").tolist() == [b"red"]


BODY = json.dumps({"inputs": [{"name": "photos", "datatype": "BYTES", "shape": [1], "data": ["YQ=="]}]}).encode()


@pytest.mark.parametrize(
    ("encoding", "content", "status", "says"),
    [
        ("gzip", b"no gzip", 400, "is not gzip"),
        ("gzip", gzip.compress(BODY)[:-10], 400, "cut short"),
        ("gzip", gzip.compress(BODY) + b"more", 400, "goes on after"),
        ("deflate", zlib.compress(BODY)[:-10], 400, "cut short"),
        ("br", BODY, 415, "gzip or deflate"),
        ("gzip", gzip.compress(b" " * 70_000_000, 1), 413, "once inflated"),
    ],
    ids=["no gzip", "gzip cut", "gzip and more", "zlib cut", "brotli", "too large"],
)
def test_what_cannot_be_inflated_is_refused(
    server: Running, space: str, encoding: str, content: bytes, status: int, says: str
) -> None:
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    refused = server.http.post(f"/v2/models/{space}/infer", content=content, headers=headers)
    assert refused.status_code == status
    assert says in refused.json()["error"]
    all_given_back(server)


def test_a_bomb_takes_no_more_than_a_body_may(server: Running, space: str) -> None:
    """300 MB of zeros come as 300 kB: 64 MB of them are inflated, in pieces, and the rest is not."""
    bomb = gzip.compress(b"\0" * 300_000_000, 9)
    started = time.perf_counter()
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    refused = server.http.post(f"/v2/models/{space}/infer", content=bomb, headers=headers)
    assert refused.status_code == 413
    assert time.perf_counter() - started < 5
    all_given_back(server)


def test_a_count_of_classes_is_refused_and_not_ignored(triton: InferenceServerClient, space: str, photo: Photo) -> None:
    wanted = [InferRequestedOutput("logits", class_count=2)]
    with pytest.raises(InferenceServerException, match="class_count is not taken"):
        triton.infer(space, [photos(photo("red", 1))], outputs=wanted)
