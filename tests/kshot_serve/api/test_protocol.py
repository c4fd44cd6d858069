"""The Open Inference Protocol's tensors: what a client written from the specification sends is read, and back."""

from __future__ import annotations

import base64
import json
import struct
import time
from typing import Any

import numpy as np
import pytest

from kshot_serve.api.protocol import Infer, Spec, read, strings, write
from kshot_serve.errors import Problem

MOST = 32
SPECS = (Spec("photos", "BYTES", (-1,)), Spec("images", "UINT8", (-1, 1, 2, 2)), Spec("gain", "FP32", (-1,)))


def request(*inputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def images(data: Any, shape: Any = (2, 1, 2, 2), **more: Any) -> dict[str, Any]:
    return {"name": "images", "datatype": "UINT8", "shape": list(shape), "data": data, **more}


def photos(*data: Any, **more: Any) -> dict[str, Any]:
    return {"name": "photos", "datatype": "BYTES", "shape": [len(data)], "data": list(data), **more}


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6, 7, 8], [[[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]]]])
def test_json_data_may_be_flat_or_nested(data: list[Any]) -> None:
    found = read(request(images(data)), None, SPECS, MOST).inputs["images"]
    assert found.dtype == np.uint8
    assert found.tolist() == [[[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]]]


def test_bytes_in_json_are_base64() -> None:
    """gh:kserve/open-inference-protocol#12: the specification leaves open how BYTES look in JSON."""
    said = {"parameters": {"content_type": "base64"}}
    for more in ({}, said):
        found = read(request(photos(base64.b64encode(b"\xff\x00").decode(), **more)), None, SPECS, MOST).inputs[
            "photos"
        ]
        assert found.tolist() == [b"\xff\x00"]


def test_binary_tensors_follow_the_json_in_the_order_of_the_inputs() -> None:
    first = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 2, 2], "parameters": {"binary_data_size": 4}}
    photo = struct.pack("<I", 3) + b"abc" + struct.pack("<I", 0)
    second = {"name": "photos", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(photo)}}
    head = request(first, second)
    found = read(head + bytes([1, 2, 3, 4]) + photo, str(len(head)), SPECS, MOST)
    assert found.inputs["images"].ravel().tolist() == [1, 2, 3, 4]
    assert found.inputs["photos"].tolist() == [b"abc", b""]


def test_a_column_of_strings_counts_as_a_list_of_them() -> None:
    sent = {"name": "photos", "datatype": "BYTES", "shape": [2, 1], "data": ["YQ==", "Yg=="]}
    assert read(request(sent), None, SPECS, MOST).inputs["photos"].tolist() == [b"a", b"b"]


BINARY = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 2, 2], "parameters": {"binary_data_size": 4}}


@pytest.mark.parametrize(
    ("body", "header_length", "says"),
    [
        (b"", None, "not JSON"),
        (b"{}", "9" * 5_000, "not a length within the body"),
        (b"{", None, "not JSON"),
        (b"[" * 1_100, None, "not JSON"),
        (b"[]", None, "no JSON object"),
        (b"{}", None, "inputs is no list"),
        (b'{"inputs": [1]}', None, "no JSON object"),
        (b'{"inputs": [{}]}', None, "has no name"),
        (b'{"inputs": [{"name": "x"}]}', None, "it takes photos, images, gain"),
        (request(photos("YQ=="), photos("YQ==")), None, "comes twice"),
        (request(photos("not base64!")), None, "not base64"),
        (request(photos(7)), None, "not base64"),
        (request(photos("a text", parameters={"content_type": "str"})), None, "taken as base64"),
        (request({"name": "photos", "datatype": "FP32", "shape": [1], "data": [1]}), None, "datatype BYTES"),
        (request(images([1, 2, 3])), None, "not the 8 values"),
        (request(images([0] * 8, (2, 4))), None, "must have shape [-1, 1, 2, 2]"),
        (request(images([0] * 8, (-2, 1, 2, 2))), None, "no list of whole numbers"),
        (request(images([0], (9, 1, 2, 2))), None, "values that its shape says"),
        (request(images([0] * 7 + [256])), None, "not UINT8 values"),
        (request(images([0] * 7 + [1.5])), None, "not UINT8 values"),
        (request(images([0] * 7 + ["1"])), None, "not UINT8 values"),
        (request({"name": "gain", "datatype": "FP32", "shape": [1], "data": [{}]}), None, "not FP32 values"),
        (request(images([[[[[[[[[[0]]]]]]]]]])), None, "nested deeper"),
        (request({"name": "images", "datatype": "UINT8", "shape": [1, 1, 2, 2]}), None, "neither data nor"),
        (request(BINARY) + b"123", str(len(request(BINARY))), "binary_data_size is not the size"),
        (request(BINARY) + b"12345", str(len(request(BINARY))), "1 bytes more came"),
        (request(BINARY), "99999", "not a length within the body"),
        (request(BINARY), "-1", "not a length within the body"),
        (request(BINARY | {"shape": [2, 1, 2, 2]}) + b"1234", str(len(request(BINARY))), "needs 8 bytes"),
        (request(id=7), None, "id is no printable string"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_words(body: bytes, header_length: str | None, says: str) -> None:
    with pytest.raises(Problem) as refused:
        read(body, header_length, SPECS, MOST)
    assert refused.value.code == "bad_request"
    assert says in refused.value.message


@pytest.mark.parametrize(
    "tail", [b"\xff\xff\xff\xffa", b"\x01\x00\x00\x00", b"\x01\x00\x00\x00ab", b"\x00" * 8, b"\x00"]
)
def test_lengths_of_bytes_elements_are_not_believed(tail: bytes) -> None:
    sent = {"name": "photos", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(tail)}}
    head = request(sent)
    with pytest.raises(Problem, match="not 1 elements, each after its length"):
        read(head + tail, str(len(head)), SPECS, MOST)


FOUND = {"class": ("BYTES", strings(["cat", "żółw"])), "probability": ("FP32", np.array([0.5, 0.25], np.float32))}


def test_an_answer_in_json_echoes_the_id_and_gives_texts_plainly() -> None:
    body, header_length = write("m", "4", Infer("42", {}, (), {}, False), FOUND)
    assert header_length is None
    assert json.loads(body) == {
        "model_name": "m", "model_version": "4", "id": "42",
        "outputs": [
            {
                "name": "class", "datatype": "BYTES", "shape": [2],
                "parameters": {"content_type": "str"}, "data": ["cat", "żółw"],
            },
            {"name": "probability", "datatype": "FP32", "shape": [2], "data": [0.5, 0.25]},
        ],
    }  # fmt: skip


def test_each_output_may_be_binary_by_itself_or_all_by_default() -> None:
    body, header_length = write("m", "4", Infer(None, {}, ("probability", "class"), {"class": True}, False), FOUND)
    assert header_length is not None
    head = json.loads(body[:header_length])
    assert "id" not in head
    assert [output["name"] for output in head["outputs"]] == ["probability", "class"]
    assert head["outputs"][0]["data"] == [0.5, 0.25]
    tail = body[header_length:]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": len(tail)}
    assert tail == struct.pack("<I", 3) + b"cat" + struct.pack("<I", 7) + "żółw".encode()
    _, header_length = write("m", "4", Infer(None, {}, (), {}, True), FOUND)
    assert header_length is not None


def test_an_output_that_the_model_does_not_give_is_refused() -> None:
    with pytest.raises(Problem, match="it gives class, probability"):
        write("m", "4", Infer(None, {}, ("colour",), {}, False), FOUND)


@pytest.mark.parametrize("filler", ["[],", "{},", "0,", "[" * 100 + "]" * 100 + ","])
def test_json_of_too_many_values_is_refused_before_it_is_parsed(filler: str) -> None:
    """A parser makes 30 times the memory of it, and stops all other requests meanwhile."""
    body = b'{"inputs": [{"name": "images", "data": [' + filler.encode() * (10_000_000 // len(filler)) + b"0]}]}"
    started = time.perf_counter()
    with pytest.raises(Problem, match="more values than"):
        read(body, None, SPECS, MOST)
    assert time.perf_counter() - started < 0.5


def test_json_of_as_many_values_as_the_largest_request_has_is_taken() -> None:
    rows = np.zeros((MOST, *SPECS[1].shape[1:]), np.uint8)
    given = {"name": "images", "datatype": "UINT8", "shape": list(rows.shape), "data": rows.tolist()}
    found = read(json.dumps({"inputs": [given]}).encode(), None, SPECS, MOST).inputs["images"]
    assert found.shape == rows.shape


def test_more_rows_than_photos_may_come_are_refused() -> None:
    for name, kind, shape in (("photos", "BYTES", [MOST + 1]), ("images", "UINT8", [2**31 - 1, *SPECS[1].shape[1:]])):
        sent = {"name": name, "datatype": kind, "shape": shape, "data": []}
        with pytest.raises(Problem, match="more than 32") as refused:
            read(json.dumps({"inputs": [sent]}).encode(), None, SPECS, MOST)
        assert refused.value.code == "too_many_photos"
