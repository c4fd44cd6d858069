"""The Open Inference Protocol's tensors, in JSON and in the binary extension: bytes in, arrays out, and back.

JSON says of BYTES only that they are strings (gh:kserve/open-inference-protocol#12). Here an input's are base64,
since photos are no text, and an output's are plain text; `parameters.content_type` says which.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kshot_serve.errors import Problem

EXTENSIONS = ("binary_tensor_data", "model_configuration", "statistics")

_TYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
_MOST_DIMENSIONS = 8
_OTHER_VALUES = 1000  # of a request in JSON, beside its tensors' data


@dataclass(frozen=True)
class Spec:
    """A tensor that a model takes or gives; -1 stands for any number."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True)
class Infer:
    """A request: its tensors by name, and which outputs are wanted in which form."""

    id: str | None
    inputs: Mapping[str, np.ndarray]  # BYTES as an array of bytes objects
    outputs: tuple[str, ...]  # empty: all
    binary: Mapping[str, bool]
    binary_default: bool

    def is_binary(self, output: str) -> bool:
        return self.binary.get(output, self.binary_default)


def read(body: bytes, header_length: str | None, specs: Sequence[Spec], most: int) -> Infer:
    """A request's body as tensors of at most so many rows that fit the model's inputs, or a refusal."""
    split = len(body)
    if header_length is not None:
        if not re.fullmatch(r"[0-9]{1,12}", header_length) or int(header_length) > len(body):
            raise _bad("Inference-Header-Content-Length is not a length within the body")
        split = int(header_length)
    _bound(body, split, specs, most)
    try:
        request = json.loads(body[:split])
    except (ValueError, RecursionError):
        raise _bad(
            "the body is not JSON; with binary tensors, Inference-Header-Content-Length says where it ends"
        ) from None
    request = _object(request, "the request")
    name = request.get("id")
    if name is not None and (not isinstance(name, str) or len(name) > 256 or not name.isprintable()):
        raise _bad("id is no printable string of at most 256 characters")
    taken = {spec.name: spec for spec in specs}
    inputs: dict[str, np.ndarray] = {}
    at = split
    for given in _objects(request.get("inputs"), "inputs"):
        spec = taken.get(given["name"])
        if spec is None:
            raise _bad(f"an input has a name that this model does not take; it takes {_names(taken)}")
        if spec.name in inputs:
            raise _bad(f"input {spec.name} comes twice")
        shape = _shape(given, spec)
        if shape[0] > most:
            raise Problem("too_many_photos", f"more than {most} came in one request; send fewer at once")
        size = _parameters(given).get("binary_data_size")
        if size is None:
            inputs[spec.name] = _from_json(given, spec, shape)
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(body) - at:
            raise _bad(f"input {spec.name}: binary_data_size is not the size of data that follow the JSON")
        inputs[spec.name] = _from_bytes(body[at : at + size], spec, shape)
        at += size
    if at != len(body):
        raise _bad(f"{len(body) - at} bytes more came than the inputs' binary_data_size say")
    wanted = _objects(request.get("outputs", []), "outputs")
    if any("classification" in _parameters(output) for output in wanted):
        raise _bad("class_count is not taken: ask for the outputs class and probability, or for logits and classes")
    return Infer(
        name,
        inputs,
        tuple(output["name"] for output in wanted),
        {
            output["name"]: bool(parameters["binary_data"])
            for output in wanted
            if "binary_data" in (parameters := _parameters(output))
        },
        bool(_parameters(request).get("binary_data_output", False)),
    )


def write(
    model: str, version: str, infer: Infer, found: Mapping[str, tuple[str, np.ndarray]]
) -> tuple[bytes, int | None]:
    """A response's body, and the length of its JSON if binary tensors follow; `found` is name -> (datatype, values)."""
    if strange := [name for name in infer.outputs if name not in found]:
        raise _bad(f"{len(strange)} of the outputs asked for are none that this model gives; it gives {_names(found)}")
    outputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name in dict.fromkeys(infer.outputs or found):
        datatype, values = found[name]
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
        if infer.is_binary(name):
            tail.append(_to_bytes(datatype, values))
            output["parameters"] = {"binary_data_size": len(tail[-1])}
        elif datatype == "BYTES":
            output["parameters"] = {"content_type": "str"}
            output["data"] = [value.decode() for value in values.ravel()]
        else:
            output["data"] = values.ravel().tolist()
        outputs.append(output)
    response = {"model_name": model, "model_version": version, "outputs": outputs}
    if infer.id is not None:
        response["id"] = infer.id
    head = json.dumps(response, allow_nan=False).encode()
    return b"".join([head, *tail]), len(head) if tail else None


def strings(values: Sequence[str]) -> np.ndarray:
    """Texts as a BYTES tensor."""
    array = np.empty(len(values), object)
    array[:] = [value.encode() for value in values]
    return array


def _bound(body: bytes, end: int, specs: Sequence[Spec], most: int) -> None:
    """Refuse JSON of more values than any sound request has, before they are made.

    A value of two bytes would take seventy as an object, and a parser stops all else in this process meanwhile.
    """
    values = most * max(math.prod(spec.shape[1:]) for spec in specs) + _OTHER_VALUES
    if body.count(b",", 0, end) > values or body.count(b"[", 0, end) + body.count(b"{", 0, end) > values:
        raise _bad(f"the JSON has more values than {most} rows of this model's inputs")


def _shape(given: Mapping[str, Any], spec: Spec) -> tuple[int, ...]:
    if given.get("datatype") != spec.datatype:
        raise _bad(f"input {spec.name} must have datatype {spec.datatype}")
    shape = given.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
        raise _bad(f"input {spec.name}: shape is no list of whole numbers")
    if spec.datatype == "BYTES" and len(shape) == 2 and shape[1] == 1:
        shape = shape[:1]  # a column, as many clients send lists of strings
    if len(shape) != len(spec.shape) or any(
        want not in (-1, came) for want, came in zip(spec.shape, shape, strict=False)
    ):
        raise _bad(f"input {spec.name} must have shape {list(spec.shape)}, where -1 is any number")
    return tuple(shape)


def _from_json(given: Mapping[str, Any], spec: Spec, shape: tuple[int, ...]) -> np.ndarray:
    data = given.get("data")
    if not isinstance(data, list):
        raise _bad(f"input {spec.name} has neither data nor binary_data_size")
    count = math.prod(shape)
    values = list(_flat(data, spec))
    if len(values) != count:
        raise _bad(f"input {spec.name}: its data are not the {count} values that its shape says")
    if spec.datatype == "BYTES":
        if _parameters(given).get("content_type", "base64") != "base64":
            raise _bad(f"input {spec.name}: BYTES in JSON are taken as base64; or send them as binary tensors")
        return _objects_of([_base64(value, spec) for value in values], shape)
    kind = np.dtype(_TYPES[spec.datatype])
    try:
        if kind.kind in "iu" and any(type(value) is not int for value in values):
            raise TypeError
        return np.array(values, kind).reshape(shape)
    except (TypeError, ValueError, OverflowError):
        raise _bad(f"input {spec.name}: its data are not {spec.datatype} values") from None


def _flat(data: list[Any], spec: Spec, depth: int = 0) -> Iterator[Any]:
    """The values of lists in lists, row by row."""
    if depth > _MOST_DIMENSIONS:
        raise _bad(f"input {spec.name}: its data are nested deeper than any shape")
    for value in data:
        if isinstance(value, list):
            yield from _flat(value, spec, depth + 1)
        else:
            yield value


def _base64(value: Any, spec: Spec) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise _bad(f"input {spec.name}: its data are not base64") from None


def _from_bytes(data: bytes, spec: Spec, shape: tuple[int, ...]) -> np.ndarray:
    count = math.prod(shape)
    if spec.datatype == "BYTES":
        return _objects_of(_split(data, count, spec), shape)
    kind = np.dtype(_TYPES[spec.datatype])
    if len(data) != count * kind.itemsize:
        raise _bad(f"input {spec.name}: its shape needs {count * kind.itemsize} bytes, and {len(data)} came")
    return np.frombuffer(data, kind).reshape(shape)


def _split(data: bytes, count: int, spec: Spec) -> list[bytes]:
    """Elements that each follow their length, 4 bytes little-endian."""
    elements: list[bytes] = []
    at = 0
    while at < len(data) and len(elements) < count:
        size = int.from_bytes(data[at : at + 4], "little")
        elements.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if at != len(data) or len(elements) != count:
        raise _bad(f"input {spec.name}: its data are not {count} elements, each after its length")
    return elements


def _to_bytes(datatype: str, values: np.ndarray) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in values.ravel())
    return np.ascontiguousarray(values, _TYPES[datatype]).tobytes()


def _objects_of(values: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(f"{what} is no JSON object")
    return value


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _bad(f"{what} is no list")
    for each in value:
        if not isinstance(_object(each, f"one of {what}").get("name"), str):
            raise _bad(f"one of {what} has no name")
    return value


def _parameters(of: Mapping[str, Any]) -> dict[str, Any]:
    return _object(of.get("parameters") or {}, "parameters")


def _names(known: Mapping[str, Any]) -> str:
    return ", ".join(known)


def _bad(message: str) -> Problem:
    return Problem("bad_request", message)
